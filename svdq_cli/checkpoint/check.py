"""Is a checkpoint what it claims to be? Structure first, then numbers, then the weights it represents."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.checkpoint.check_encoders import encoder_problems, four_bit_encoders
from svdq_cli.checkpoint.detect import STORED_DTYPES, specs_of_headers
from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.checkpoint.recorded_bytes import Compared, changed_bytes
from svdq_cli.errors import CheckFailedError, InputError
from svdq_cli.formats.soundness import differences
from svdq_cli.records import Event, LayerPlan, Observer, W4A4Solution, ignore_events
from svdq_cli.reports import CheckProblem, CheckReport
from svdq_cli.solve.rebuild import WeightError, bias_error, curve_error, is_curve, weight_error
from svdq_cli.source import Source, TensorEntry, is_finite, only, read_tensor, tensor_entry
from svdq_cli.system.threads import cores, prefetch

# Rounding and every search leave a cosine of 0.98 and more (the lowest of 1,218 layers of tiny models of all families,
# calibrated on a handful of rows). Numbers in a wrong order have one of 0. In between, with room for layers that no one
# has seen: failing a good conversion after hours is the worse mistake.
LEAST_AGREEMENT = 0.6
MAX_STRAYED_ROWS = 0.05
# 0.2 at most on the same layers; a permuted factor gives -0.65 to -1, an inverted one -2.
MAX_SMOOTH_SLOPE = 0.5
# A conversion notes every layer's weight error. Only the order of a sum or a source in another 16-bit dtype may move
# it afterwards.
RECORD_TOLERANCE = 0.02
# A LoRA that is folded in adds to the weight and hardly to the error, whose part of the weight so becomes less. It may
# become more where the LoRA takes away from the weight.
FOLDED_TOLERANCE = 1.25
WEIGHT_ERROR, WEIGHT_ERROR_AT_MOST = "weight_error", "weight_error_at_most"  # keys of the provenance
_CHECKERS = 2  # threads; few, because each holds a layer and the source's
MAX_BIAS_ERROR = 0.05  # biases are only rounded to 16 bits; a permuted one is off by more than 1


def check(
    path: Path, *, against: Source | None = None, base: Path | None = None, observe: Observer = ignore_events
) -> CheckReport:
    """Structure, finite values and, with the source available, how well each layer rebuilds its weight. `base`: see
    `open_checkpoint`."""
    checkpoint = open_checkpoint(path, base=base or (against.pipeline if against else None))
    if against is not None:
        against = only(against, checkpoint.source.components)
        require_same_model(checkpoint, against)
        against = checkpoint.stored_biases(against)
    problems, errors = _examined(checkpoint, against, observe)
    own = checkpoint.source.pipeline if path.is_dir() else None
    encoders = four_bit_encoders(own) if own else ()
    for name in encoders:
        assert own is not None
        problems += encoder_problems(own, name, against.pipeline if against else None)
    # problems say more than that something changed
    compared = Compared() if problems else changed_bytes(path, checkpoint)
    for note in compared.notes:
        observe(Event("warning", "check", detail=note))
    problems += compared.problems
    return CheckReport(
        status="failed" if problems else "ok",
        format=checkpoint.format.name,
        layers=len(checkpoint.layers),
        problems=tuple(problems),
        layer_error=errors or None,
        noted_error={
            name: noted.error for name, noted in _weight_errors(checkpoint).items() if name in errors
        }
        or None,
        text_encoders=encoders,
        warnings=compared.notes,
    )


def require_same_model(checkpoint: Checkpoint, source: Source) -> None:
    """InputError for a source whose layers are not those of the checkpoint: it was made from another model."""
    for plan in checkpoint.layers:
        linear = plan.linear
        entry = source.tensors.get(f"{linear.name}.weight")
        if entry is None or tuple(entry.shape[:2]) != (linear.out_features, linear.in_features):
            there = "is missing" if entry is None else f"has {entry.shape[0]} x {entry.shape[1]} weights"
            raise InputError(
                f"{source.path} is not the model that the checkpoint was made from: {linear.name} {there} there, "
                f"but {linear.out_features} x {linear.in_features} in the checkpoint",
                hint="give the model that the checkpoint was made from",
                where=linear.name,
                kind="shape-mismatch",
            )


def first_difference(checkpoint: Checkpoint, source: Source) -> str | None:
    """The first layer whose weight can't have been made from the source's, or None. Layers that can't be decoded say
    nothing of the source."""
    notes, source = _weight_errors(checkpoint), checkpoint.stored_biases(source)

    def differs(plan: LayerPlan) -> bool:
        found = _verdict(checkpoint, source, plan, notes.get(plan.name))
        return bool(found.problems) and found.error is not None

    verdicts = prefetch(checkpoint.layers, differs, threads=cores(_CHECKERS))
    return next((plan.name for plan, found in verdicts if found), None)


def require_sound(partial: Path, source: Source, observe: Observer) -> None:
    """CheckFailedError unless what was just written is a checkpoint of `source`."""
    report = check(partial, against=source, observe=observe)
    if report.problems:
        first = report.problems[0]
        raise CheckFailedError(
            f"the self-check of the written checkpoint failed: {first.layer}: {first.what}"
            + (f" (and {len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""),
            hint="no output was written under the final name; please report this with the recipe",
            where=first.layer,
        )


def find_problems(checkpoint: Checkpoint) -> list[CheckProblem]:
    """Missing, foreign, misshapen and non-finite tensors; every layer must decode."""
    return _examined(checkpoint, None, ignore_events)[0]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """The result of one layer: its problems, and its relative weight error (None without a source)."""

    problems: tuple[CheckProblem, ...]
    error: float | None = None


def _examined(
    checkpoint: Checkpoint, source: Source | None, observe: Observer
) -> tuple[list[CheckProblem], dict[str, float]]:
    """(what is wrong, the relative weight error of each layer). Every layer is read and decoded once, some of them side
    by side. Without a source nothing is compared."""
    problems = structure_problems(checkpoint)
    if problems:
        return problems, {}
    errors: dict[str, float] = {}
    notes = _weight_errors(checkpoint)
    started, total = time.monotonic(), len(checkpoint.layers)
    observe(Event("start", "check", 0, total))

    def verdict(plan: LayerPlan) -> _Verdict:
        return _verdict(checkpoint, source, plan, notes.get(plan.name))

    verdicts = prefetch(checkpoint.layers, verdict, threads=cores(_CHECKERS))
    for done, (plan, found) in enumerate(verdicts, 1):
        problems += found.problems
        if found.error is not None:
            errors[plan.name] = found.error
        observe(Event("advance", "check", done, total, plan.name, time.monotonic() - started))
    for name in checkpoint.kept_specs():
        if not is_finite(read_tensor(checkpoint.source, name)):
            problems.append(CheckProblem(name, "holds NaN or infinite values"))
    observe(Event("end", "check", total, total, seconds=time.monotonic() - started))
    return problems, errors


def _weight_errors(checkpoint: Checkpoint) -> Mapping[str, _Noted]:
    """What the conversion noted, by layer."""
    found: dict[str, _Noted] = {}
    for key in (WEIGHT_ERROR_AT_MOST, WEIGHT_ERROR):
        noted = (checkpoint.provenance or {}).get(key)
        for name, error in (noted if isinstance(noted, Mapping) else {}).items():
            if isinstance(error, (int, float)):
                found[name] = _Noted(float(error), exact=key == WEIGHT_ERROR)
    prefix = noted_prefix(checkpoint, found)
    return {name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)}


def noted_prefix(checkpoint: Checkpoint, noted: Iterable[str]) -> str:
    """What precedes a layer's name in what the conversion noted: its names are those of the whole pipeline
    (`source.denoisers`), also where one of its denoisers is opened alone."""
    prefix = f"{checkpoint.source.component}."
    alone = len(checkpoint.source.components) == 1
    return prefix if alone and any(name.startswith(prefix) for name in noted) else ""


@dataclass(frozen=True, slots=True)
class _Noted:
    """The relative weight error that a conversion noted. Not `exact`: a LoRA has been folded into the layer since."""

    error: float
    exact: bool

    def explains(self, error: float) -> bool:
        if self.exact:
            return abs(error - self.error) <= RECORD_TOLERANCE * self.error + 1e-4
        return error <= FOLDED_TOLERANCE * self.error + 1e-4


@dataclass(frozen=True, slots=True)
class _StoredRows:
    """A weight of the source as a matrix (N, K), read some rows at a time; a 1x1 convolution has (N, K, 1, 1)."""

    entry: TensorEntry

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.entry.shape[0], math.prod(self.entry.shape[1:])))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __len__(self) -> int:
        return self.entry.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        return self.entry.read_rows(rows.start, rows.stop).flatten(1)


def _verdict(
    checkpoint: Checkpoint, source: Source | None, plan: LayerPlan, recorded: _Noted | None
) -> _Verdict:
    """`recorded`: the weight error that the conversion noted, if it did."""
    try:
        solution = checkpoint.solution(plan)
    except InputError as error:
        return _Verdict((CheckProblem(plan.name, error.message),))
    if source is None:
        return _Verdict(())
    weight = _StoredRows(tensor_entry(source, f"{plan.name}.weight"))
    bias = read_tensor(source, f"{plan.name}.bias") if plan.linear.bias else None
    error = weight_error(solution, weight)
    if isinstance(solution, W4A4Solution) and is_curve(solution) and (recorded is None or recorded.exact):
        error = replace(error, agreement=1 - curve_error(solution, weight))
    problems = tuple(_differences(plan, error, bias_error(solution, bias), recorded))
    return _Verdict(problems, round(error.relative, 5))


def _differences(
    plan: LayerPlan, error: WeightError, bias_error: float, recorded: _Noted | None
) -> Iterator[CheckProblem]:
    """What no rounding explains."""
    if what := _disagreement(error, recorded):
        yield CheckProblem(plan.name, f"its weight does not match the source's: {what}")
    if not bias_error <= MAX_BIAS_ERROR:
        yield CheckProblem(
            plan.name, f"its bias does not match the source's (relative error {bias_error:.2f})"
        )


def _disagreement(error: WeightError, recorded: _Noted | None) -> str | None:
    """Why a weight can't have been made from the source's, or None."""
    if not (error.agreement >= LEAST_AGREEMENT and error.strayed_rows <= MAX_STRAYED_ROWS):
        return (
            f"the 4-bit part agrees with the source's to {error.agreement:.2f} (1 is perfect), "
            f"{error.strayed_rows:.0%} of its rows not at all"
        )
    if not abs(error.smooth_slope) <= MAX_SMOOTH_SLOPE:
        return "its channels are scaled by a smoothing factor other than the stored one (inverted or out of order)"
    if recorded is not None and not recorded.explains(error.relative):
        return f"its error is {error.relative:.4f}, but the conversion recorded {recorded.error:.4f}"
    return None


def structure_problems(checkpoint: Checkpoint) -> list[CheckProblem]:
    """Missing, foreign and misshapen tensors, from the headers alone."""
    found = specs_of_headers(checkpoint.source)
    foreign = [n for n, entry in checkpoint.source.tensors.items() if entry.dtype not in STORED_DTYPES]
    problems = [CheckProblem(n, f"has dtype {checkpoint.source.tensors[n].dtype}") for n in foreign]
    packed = checkpoint.packed_specs()
    kept = checkpoint.kept_specs()
    markers = checkpoint.marker_names()
    problems += [
        CheckProblem(name, "is missing; the runtime needs it to recognize this variant of the model")
        for name in markers
        if name not in found
    ]
    for name in sorted(found.keys() - packed.keys() - kept.keys() - set(markers)):
        problems.append(CheckProblem(name, "is a tensor that does not belong to this checkpoint"))
    for name, shape in kept.items():
        if name not in found:
            problems.append(CheckProblem(name, "is missing"))
        elif found[name].shape != shape:
            problems.append(
                CheckProblem(name, f"has shape {list(found[name].shape)} instead of {list(shape)}")
            )
    present = {name: spec for name, spec in found.items() if name in packed}
    problems += [CheckProblem(clause.split(" ")[0], clause) for clause in differences(packed, present)]
    return problems
