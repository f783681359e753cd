"""The plots of an evaluation, from a checkpoint, its source, its report and what the evaluation judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from torch import Tensor

from svdq_cli.checkpoint.detect import format_of
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.checkpoint.writer import report_path
from svdq_cli.errors import InputError
from svdq_cli.evaluation.layer_sqnr import JudgedLayers
from svdq_cli.evaluation.plots import (
    LayerRank,
    LayerSteps,
    Subject,
    plot_activations,
    plot_layers,
    plot_ranks,
    plot_singular_values,
)
from svdq_cli.evaluation.spectra import Spectra, spectra_of
from svdq_cli.records import SharedInput, W4A4Plan, W4A4Solution
from svdq_cli.source import read_tensor
from svdq_cli.storage.json_files import read_json

WORST, TYPICAL = 4, 2  # layers that are looked at closely


Search = Mapping[str, Mapping[str, float]]  # layer -> step -> SQNR in dB, in the order of the steps


def plot_evaluation(folder: Path, judged: JudgedLayers, *, search: Search) -> None:
    """Write layers.png, ranks.png and, where there are W4A4 layers, singular_values.png and activations.png; each as an
    SVG too."""
    checkpoint = judged.checkpoint
    ranks = _ranks(checkpoint)
    plot_layers(folder / "layers.png", judged.sqnr.per_layer, ranks, _layer_steps(judged.inputs, search))
    plot_ranks(folder / "ranks.png", ranks)
    subjects = _subjects(judged)
    if not subjects:
        return
    input_of = {name: shared.name for shared in judged.inputs for name in shared.layers}
    spectra: list[tuple[Subject, Spectra]] = []
    maxima: list[tuple[Subject, Tensor, Tensor]] = []
    for subject, plan in subjects:
        solution = cast("W4A4Solution", checkpoint.solution(plan))
        weight = read_tensor(judged.source, f"{plan.name}.weight").flatten(1)
        branch = solution.up.float() @ solution.down.float()
        spectra.append((subject, spectra_of(weight, solution.smooth, branch)))
        before = judged.abs_max[input_of[plan.name]].float()
        maxima.append((subject, before, before / solution.smooth.float()))
    plot_singular_values(folder / "singular_values.png", spectra)
    plot_activations(folder / "activations.png", maxima)


def conversion_report(path: Path) -> Mapping[str, object]:
    """The JSON report that is stored with the checkpoint at `path`; empty where there is none. Raises InputError."""
    report = _report_of(path)
    return read_json(report) if report and report.is_file() else {}


def _report_of(path: Path) -> Path | None:
    """Where the report of a conversion is stored; None where `path` is not a checkpoint."""
    fmt = format_of(path)
    return report_path(path, fmt) if fmt else None


def search_of(path: Path) -> Search:
    """What the search measured, from the report of the conversion that made the checkpoint at `path`.

    Empty where there is no report, or none with a search. Raises InputError for a damaged one.
    """
    search = conversion_report(path).get("search")
    if search is None:
        return {}
    try:
        layers = cast("Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]", search)["layers"]
        steps = {
            name: {step: float(db) for step, db in layer["steps_db"].items()}
            for name, layer in layers.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{_report_of(path)}: not the report of a conversion: 'search' holds no steps_db of every layer",
            hint="restore the file, or remove it to evaluate without the search steps",
            where=str(_report_of(path)),
        ) from error
    return {name: db for name, db in steps.items() if len(db) > 1}


def _ranks(checkpoint: Checkpoint) -> dict[str, LayerRank]:
    """What became of every linear, in the order of the model."""
    ranks: dict[str, LayerRank] = {linear.name: "16-bit" for linear in checkpoint.kept}
    for plan in checkpoint.layers:
        ranks[plan.name] = plan.rank if isinstance(plan, W4A4Plan) else "w4a16"
    order = {name.removesuffix(".weight"): index for index, name in enumerate(checkpoint.state)}
    return dict(sorted(ranks.items(), key=lambda item: order[item[0]]))


def _layer_steps(inputs: Sequence[SharedInput], search: Search) -> dict[str, LayerSteps]:
    """The search takes a step for all layers of one input or for none: where it lowers the sum of their noise over
    signal below the best so far."""
    found: dict[str, LayerSteps] = {}
    for shared in inputs:
        layers = {name: search[name] for name in shared.layers if name in search}
        if not layers:
            continue
        taken: set[str] = set()
        least = math.inf
        start, *tried = next(iter(layers.values()))
        for step in (start, *tried):
            noise = sum(10 ** (-db[step] / 10) for db in layers.values() if step in db)
            if noise < least:
                taken.add(step)
                least = noise
        found |= {name: LayerSteps(db, frozenset(taken)) for name, db in layers.items()}
    return found


def _subjects(judged: JudgedLayers) -> list[tuple[Subject, W4A4Plan]]:
    """The W4A4 layers to look at: the worst, then those next to the median; one layer of an input at most."""
    plans = {plan.name: plan for plan in judged.checkpoint.layers if isinstance(plan, W4A4Plan)}
    lowest = (
        min(
            (name for name in shared.layers if name in plans),
            key=judged.sqnr.per_layer.__getitem__,
            default=None,
        )
        for shared in judged.inputs
    )
    ascending = sorted((name for name in lowest if name), key=judged.sqnr.per_layer.__getitem__)
    worst, rest = ascending[:WORST], ascending[WORST:]
    middle = max(0, len(ascending) // 2 - WORST - TYPICAL // 2)
    typical = rest[middle : middle + TYPICAL]
    reasons: tuple[tuple[Literal["worst", "typical"], list[str]], ...] = (
        ("worst", worst),
        ("typical", typical),
    )
    return [
        (Subject(name, judged.sqnr.per_layer[name], plans[name].rank, why), plans[name])
        for why, names in reasons
        for name in names
    ]
