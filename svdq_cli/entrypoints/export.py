"""`svdq export`: a checkpoint packed again for another runtime. Nothing is quantized again; layers keep their bits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from svdq_cli.checkpoint.biases import moved_layers
from svdq_cli.checkpoint.check import find_problems
from svdq_cli.checkpoint.lossless import same_bits
from svdq_cli.checkpoint.reader import (
    NEEDS_METADATA,
    Checkpoint,
    component_in,
    layer_of,
    open_checkpoint,
    with_component,
)
from svdq_cli.checkpoint.writer import (
    Contents,
    Target,
    output_file,
    report_path,
    target_of,
    write_report,
    write_target,
)
from svdq_cli.conversion.card import CARD_FILE, DerivedFacts, card_path, derived_card
from svdq_cli.errors import CheckFailedError, InputError, UsageError
from svdq_cli.formats import format_named
from svdq_cli.formats.contract import Format
from svdq_cli.prepare.facts import other_components_bytes
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.records import Event, LayerSolution, Observer, W4A16Plan, W4A16Solution, ignore_events
from svdq_cli.reports import RepackReport
from svdq_cli.runtime.linear import w4a16_rounded_weight
from svdq_cli.source import needed_settings
from svdq_cli.storage.atomic import refuse_existing, require_disk, whole_output, write_text
from svdq_cli.storage.output_paths import name_warnings, require_places


def export(
    path: Path,
    to: str,
    out: Path,
    *,
    base: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> RepackReport:
    """Pack a checkpoint for another format. UsageError, in words, where that can't hold exactly what is there.

    `base`: a diffusers pipeline folder for the components that a single file lacks, where the target is a pipeline.
    """
    started = time.monotonic()
    refuse_existing(out, overwrite=options.overwrite)
    checkpoint = open_checkpoint(path, hint=NEEDS_METADATA)
    pipeline = base or checkpoint.source.pipeline
    checkpoint = _with_its_component(checkpoint, pipeline)
    if problems := find_problems(checkpoint):
        raise InputError(
            f"{path}: {problems[0].layer}: {problems[0].what}",
            hint="svdq check lists what is wrong; convert the model again",
            where=problems[0].layer,
        )
    fmt = format_named(to)
    target = _target(checkpoint, fmt)
    require_places([out], folders=[not fmt.single_file], inputs=[path], overwrite=options.overwrite)
    copied = replace(checkpoint.source, pipeline=None if fmt.single_file else pipeline)
    require_disk({out: target.bytes(checkpoint.state) + other_components_bytes(copied)})
    contents = Contents(
        configs=checkpoint.source.configs,
        state=checkpoint.state,
        solutions=_Solutions(checkpoint),
        kept=lambda name: _sixteen_bit(checkpoint, name),
        provenance=checkpoint.provenance,
        scheduler=needed_settings(checkpoint.source),
    )
    observe(Event("start", "pack", 0, 1))
    with whole_output(out, overwrite=options.overwrite) as partial:
        weights = write_target(partial, target, contents, pipeline=pipeline)
        _require_same(checkpoint, open_checkpoint(partial))
        report = RepackReport(
            source_format=checkpoint.format.name,
            outputs=(output_file(fmt, out, weights),),
            layers=len(target.plan.layers),
            warnings=_warnings(checkpoint, target, pipeline, out),
            seconds=time.monotonic() - started,
        )
        file = out.name if fmt.single_file else None
        facts = DerivedFacts(fmt.name, file, file is None and pipeline is not None, report.outputs[0].bytes)
        card = derived_card(checkpoint, facts)
        if not fmt.single_file:
            write_report(report_path(partial, fmt), report)
            (partial / CARD_FILE).write_text(card, encoding="utf-8")
    if fmt.single_file:
        write_report(report_path(out, fmt), report)
        write_text(card_path(out), card)
    observe(Event("end", "pack", 1, 1, seconds=report.seconds))
    return report


def _with_its_component(checkpoint: Checkpoint, pipeline: Path | None) -> Checkpoint:
    """A file does not always say its component's name, a pipeline does."""
    if pipeline is None or len(checkpoint.denoisers) > 1:
        return checkpoint
    return with_component(checkpoint, component_in(pipeline, checkpoint))


def _target(checkpoint: Checkpoint, fmt: Format) -> Target:
    """The output's layout. UsageError for what the target can't hold exactly."""
    if checkpoint.precision is not None and checkpoint.precision not in fmt.precisions:
        raise UsageError(
            f"{fmt.name} stores {' or '.join(p.name for p in fmt.precisions)}, not {checkpoint.precision.name}",
            hint=f"convert the model with --precision {fmt.precisions[0].name}, or name another format",
            where="--to",
        )
    if fmt.name == checkpoint.format.name:
        raise UsageError(
            f"{checkpoint.source.path} is already a {fmt.name} checkpoint",
            hint="name another format with --to",
        )
    if fmt.has_branch != checkpoint.format.has_branch:
        alone = checkpoint.format if fmt.has_branch else fmt
        raise UsageError(
            f"{alone.name} has no low-rank branch, so nothing can be exported from {checkpoint.format.name} to "
            f"{fmt.name}",
            hint=f"convert the model from its source with --format {fmt.name}",
            where="--to",
            kind="not-exact",
        )
    if lossy := _unrecorded(checkpoint):
        raise UsageError(
            f"{lossy}: its bias is stored shifted for the runtime and rounded, and this file does not record the "
            "original",
            hint="convert the model again; files that svdq writes record these biases",
            where=lossy,
            kind="not-exact",
        )
    target = target_of(fmt, checkpoint.plan(), checkpoint.state, checkpoint.dtype)
    held = {layer.name for layer in target.plan.layers}
    for layer in checkpoint.layers:
        if layer.name not in held and not isinstance(layer, W4A16Plan):
            reason = fmt.unsupported_reason(layer) or "that format keeps this layer at 16 bits"
            raise UsageError(
                f"{layer.name}: {fmt.name} can't hold this 4-bit layer: {reason}",
                hint="convert the model from its source for this format",
                where=layer.name,
                kind="not-exact",
            )
    return target


def _unrecorded(checkpoint: Checkpoint) -> str | None:
    """A layer whose bias can't be had back bit for bit, or None."""
    moved = (layer for module in checkpoint.file.modules for layer in moved_layers(module))
    return next((layer.name for layer in moved if layer.name not in checkpoint.biases), None)


@dataclass(frozen=True, slots=True)
class _Solutions(Mapping[str, LayerSolution]):
    """A checkpoint's layers by name, each decoded when it is asked for."""

    checkpoint: Checkpoint

    def __getitem__(self, name: str) -> LayerSolution:
        for layer in self.checkpoint.layers:
            if layer.name == name:
                return self.checkpoint.solution(layer)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (layer.name for layer in self.checkpoint.layers)

    def __len__(self) -> int:
        return len(self.checkpoint.layers)


def _sixteen_bit(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor that the target stores at 16 bits: as it is, or what a W4A16 kernel makes of the codes."""
    if name in checkpoint.kept_names():
        return checkpoint.kept_tensor(name)
    solution = _Solutions(checkpoint)[layer_of(name)]
    if not isinstance(solution, W4A16Solution):
        raise ValueError(f"{name} is not a 16-bit tensor of this checkpoint")
    if name.endswith(".bias"):
        assert solution.bias is not None
        return solution.bias
    return w4a16_rounded_weight(solution).to(solution.scales.dtype).reshape(checkpoint.state[name])


def _require_same(before: Checkpoint, after: Checkpoint) -> None:
    """CheckFailedError unless every layer that both hold in 4 bits has the same bits, and nothing else is wrong."""
    wrong = [f"{problem.layer}: {problem.what}" for problem in find_problems(after)]
    for layer in after.layers:
        a, b = before.solution(before.by_name[layer.name]), after.solution(layer)
        fields = [name for name in type(a).__dataclass_fields__ if name != "plan"]
        wrong += [
            f"{layer.name}: {name} changed"
            for name in fields
            if not same_bits(getattr(a, name), getattr(b, name))
        ]
    if wrong:
        raise CheckFailedError(
            f"the exported checkpoint differs: {wrong[0]}",
            hint="no output was written under the final name; please report this",
            where=wrong[0].split(":")[0],
        )


def _warnings(checkpoint: Checkpoint, target: Target, pipeline: Path | None, out: Path) -> tuple[str, ...]:
    found: list[str] = []
    dropped = len(checkpoint.layers) - len(target.plan.layers)
    if dropped:
        found.append(
            f"{dropped} W4A16 layers are written at 16 bits, with the values that their 4-bit kernel uses"
        )
    if not target.format.single_file and pipeline is None:
        found.append("only the quantized component was written; --base adds the rest of the pipeline")
    return (*found, *name_warnings([out], folders=[not target.format.single_file]))
