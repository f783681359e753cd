"""What --plan predicts, against what is allocated and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdq_cli.pipeline import convert, predict
from svdq_cli.preparing import RunOptions
from svdq_cli.recipe import Calibration, Quantization, default_recipe
from svdq_cli.records import ActivationStats, Int4, Linear, SharedInput, SolveSettings, W4A4Plan
from svdq_cli.solve.costs import NOMINAL, solve_bytes, solve_work
from svdq_cli.solve.forward import SourceWeight
from svdq_cli.solve.linear import solve_input
from svdq_cli.tokens import image_tokens, pixels_per_token
from tests.allocations import Allocations

CPU = RunOptions(device="cpu")
DATA_FREE = SolveSettings("none", 0, torch.bfloat16)
PAPERS = SolveSettings("grid", 0, torch.bfloat16)
SEARCHED = SolveSettings("grid", 0, torch.bfloat16, ("learned", "gptq", "refit"))


class _ReadWhenAsked(Mapping[str, SourceWeight]):
    """Weights that are converted each time, and held by nobody."""

    def __init__(self, stored: Mapping[str, torch.Tensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> SourceWeight:
        return SourceWeight(self._stored[name].float(), None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@pytest.mark.parametrize(
    ("settings", "streamed"),
    [(DATA_FREE, False), (DATA_FREE, True), (PAPERS, False), (SEARCHED, False), (SEARCHED, True)],
    ids=["data-free", "data-free, streamed", "grid", "all steps", "all steps, streamed"],
)
@pytest.mark.parametrize(
    ("branches", "k", "rows"),
    [
        (((1024,),), 512, 512),
        (((256,),), 1024, 256),
        (((256, 256, 256), (512,)), 512, 512),
        (((128, 128, 128), (512,)), 256, 2048),
    ],
)
def test_solving_takes_the_memory_that_is_predicted(
    settings: SolveSettings, branches: tuple[tuple[int, ...], ...], k: int, rows: int, streamed: bool
):
    sizes = [n for branch in branches for n in branch]
    names = [f"layer{index}" for index in range(len(sizes))]
    waiting = iter(names)
    shared = SharedInput(
        names[0], tuple(names), tuple(tuple(next(waiting) for _ in part) for part in branches)
    )
    plans = {
        name: W4A4Plan(Linear(name, k, n, bias=False), Int4(), 32)
        for name, n in zip(names, sizes, strict=True)
    }
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).bfloat16()
    stats = ActivationStats("x", x.abs().amax(0).float(), x.float().square().mean(0), x, rows)
    given = None if settings is DATA_FREE else stats
    stored = {
        name: torch.randn(n, k, generator=generator).bfloat16() for name, n in zip(names, sizes, strict=True)
    }
    asked = _ReadWhenAsked(stored)
    with Allocations() as seen:
        solve_input(shared, plans, asked if streamed else dict(asked), given, settings)
    predicted = solve_bytes(shared, plans, settings, rows=0 if given is None else rows, streamed=streamed)
    assert predicted == pytest.approx(seen.most, rel=0.15)


def test_every_step_costs_time():
    plan = {"a": W4A4Plan(Linear("a", 512, 512, bias=False), Int4(), 32)}
    shared = SharedInput("a", ("a",), (("a",),))

    def seconds(settings: SolveSettings, rows: int) -> float:
        return NOMINAL.seconds(solve_work(shared, plan, settings, rows=rows))

    searched = [
        seconds(replace(SEARCHED, steps=steps), 512) for steps in ((), ("gptq",), ("learned", "gptq"))
    ]
    assert seconds(DATA_FREE, 0) < searched[0] < searched[1] < searched[2]


def test_what_is_written_is_what_was_predicted(tiny_flux: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo cats\n")
    recipe = default_recipe(
        str(tiny_flux),
        calibration=Calibration(prompts=str(prompts), samples=2, steps=2, height=16, width=16, rows=64),
        quantization=Quantization(effort="fast", rank=16),
    )
    plan = predict(recipe, options=CPU)
    report = convert(recipe, tmp_path / "out", options=CPU)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert plan.bytes.output == pytest.approx(
        report.bytes.output, rel=0.25
    )  # headers weigh much in a tiny model
    assert written < plan.disk_bytes, "the work folder is part of it"
    assert plan.vram_bytes is None
    parts = plan.stages
    together = parts.prepare + parts.calibrate + parts.solve + parts.pack + parts.check
    assert plan.seconds == pytest.approx(together)
    assert min(parts.calibrate, parts.solve, parts.check) > 0


def test_tokens_come_from_the_autoencoder_and_the_packing(tiny_flux: Path):
    from svdq_cli.source import open_source

    source = open_source(tiny_flux)
    assert pixels_per_token(source) == 4  # the autoencoder halves, the pipeline packs two by two
    assert image_tokens(source, height=64, width=32) == 16 * 8
