"""What an evaluation plots of a real checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.errors import InputError
from svdq_cli.evaluation.layer_sqnr import JudgedLayers
from svdq_cli.evaluation.plot import plot_evaluation, search_of
from svdq_cli.planning.structure import shared_input
from svdq_cli.records import W4A4Plan
from svdq_cli.reports import LayerSqnr
from svdq_cli.source import open_source

PLOTS = ["activations.png", "layers.png", "ranks.png", "singular_values.png"]


@pytest.fixture
def checkpoint(converted_flux: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(converted_flux("int4") / "lite", tmp_path / "lite"))


def judged(path: Path, source: Path) -> JudgedLayers:
    """As an evaluation would find it, with every layer's input taken alone."""
    opened = open_checkpoint(path)
    widths = {plan.name: plan.linear.in_features for plan in opened.layers}
    sqnr = {name: 20.0 + index for index, name in enumerate(widths)}
    return JudgedLayers(
        opened,
        open_source(source),
        LayerSqnr(30.0, 20.0, sqnr),
        tuple(shared_input([name]) for name in widths),
        {name: torch.arange(1.0, width + 1) for name, width in widths.items()},
    )


def with_search(path: Path, steps_db: Mapping[str, float]) -> None:
    report = json.loads((path / "svdq_report.json").read_text())
    names = [plan.name for plan in open_checkpoint(path).layers if isinstance(plan, W4A4Plan)]
    report["search"] = {"layers": {name: {"steps_db": steps_db} for name in names}}
    (path / "svdq_report.json").write_text(json.dumps(report))


def plotted(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png") if path.stat().st_size > 5000)


def test_a_checkpoint_without_a_report_gets_all_plots_but_the_steps(
    checkpoint: Path, tiny_flux: Path, tmp_path: Path
):
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
    with_search(checkpoint, {"start": 20.0, "learned": 21.0, "gptq": 20.5})
    plot_evaluation(tmp_path / "with", judged(checkpoint, tiny_flux), search=search_of(checkpoint))
    (checkpoint / "svdq_report.json").unlink()
    assert search_of(checkpoint) == {}
    plot_evaluation(tmp_path / "without", judged(checkpoint, tiny_flux), search={})
    assert plotted(tmp_path / "with") == plotted(tmp_path / "without") == PLOTS
    sizes = [(tmp_path / folder / "layers.png").stat().st_size for folder in ("without", "with")]
    assert sizes[0] < 0.8 * sizes[1]


def test_a_search_that_took_no_step_has_none_to_show(checkpoint: Path):
    with_search(checkpoint, {"start": 20.0})
    assert search_of(checkpoint) == {}


@pytest.mark.parametrize(
    "search", ["nothing", {}, {"layers": {"a.b": {}}}, {"layers": {"a.b": {"steps_db": {"x": "y"}}}}]
)
def test_a_damaged_report_is_named_before_the_work(checkpoint: Path, search: object):
    (checkpoint / "svdq_report.json").write_text(json.dumps({"search": search}))
    with pytest.raises(InputError, match=r"svdq_report\.json") as caught:
        search_of(checkpoint)
    assert caught.value.hint
