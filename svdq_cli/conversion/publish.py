"""The end of a conversion: outputs packed from the solved layers, checked, and given their names, all or none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from svdq_cli.checkpoint.check import require_sound
from svdq_cli.checkpoint.writer import (
    Contents,
    Target,
    output_file,
    replace_weights,
    report_path,
    write_report,
    write_target,
)
from svdq_cli.conversion.card import CARD_FILE, card_path
from svdq_cli.conversion.read_weights import require_finite
from svdq_cli.conversion.text_encoders import FourBitEncoder
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.recipe import Recipe, figure_of
from svdq_cli.records import Event, Observer
from svdq_cli.reports import ConvertReport, OutputFile, to_json
from svdq_cli.storage.atomic import sync_files, whole_output, write_text
from svdq_cli.system.threads import in_background


@dataclass(frozen=True, slots=True)
class Outputs:
    """Whole and checked, not yet under their names."""

    files: tuple[OutputFile, ...]
    pack_seconds: float
    check_seconds: float
    _partials: tuple[Path, ...]
    _targets: tuple[Target, ...]

    def write_reports(self, report: ConvertReport, cards: Sequence[str]) -> None:
        """Write the report and its model card into each output that is a folder."""
        for target, partial, card in zip(self._targets, self._partials, cards, strict=True):
            if not target.format.single_file:
                write_report(report_path(partial, target.format), report)
                (partial / CARD_FILE).write_text(card, encoding="utf-8")


@contextmanager
def finished_outputs(
    prepared: Prepared,
    paths: Sequence[Path],
    contents: Contents,
    encoders: Sequence[FourBitEncoder] = (),
    *,
    overwrite: bool,
    observe: Observer,
) -> Iterator[Outputs]:
    """Every output, packed and checked; they get their names when the block is left without an error.

    Raises CheckFailedError where what was written is not what it should be.
    """
    with ExitStack() as stack:
        partials = tuple(stack.enter_context(whole_output(path, overwrite=overwrite)) for path in paths)
        started = time.monotonic()
        weights = _pack(prepared, partials, contents, encoders, observe)
        packed = time.monotonic()
        with in_background(lambda stop: _on_disk(prepared.targets, paths, partials, weights, stop)) as facts:
            for partial in partials:
                require_sound(partial, prepared.source, observe)
            files = facts.result()
        checked = time.monotonic()
        yield Outputs(files, packed - started, checked - packed, partials, prepared.targets)


def _on_disk(
    targets: Sequence[Target],
    paths: Sequence[Path],
    partials: Sequence[Path],
    weights: Sequence[Sequence[Path]],
    stop: threading.Event,
) -> tuple[OutputFile, ...]:
    """The outputs written to the disk, which waits while others compute, and their facts. CancelledError once `stop`
    is set."""
    facts: list[OutputFile] = []
    for target, path, partial, files in zip(targets, paths, partials, weights, strict=True):
        if stop.is_set():
            raise CancelledError
        sync_files(partial)
        facts.append(output_file(target.format, path, files, stop))
    return tuple(facts)


def write_reports_beside(
    targets: Sequence[Target], paths: Sequence[Path], report: ConvertReport, cards: Sequence[str]
) -> None:
    """Write the report and its model card next to each output that is a file."""
    for target, path, card in zip(targets, paths, cards, strict=True):
        if target.format.single_file:
            write_report(report_path(path, target.format), report)
            write_text(card_path(path), card)


def _pack(
    prepared: Prepared,
    partials: Sequence[Path],
    contents: Contents,
    encoders: Sequence[FourBitEncoder],
    observe: Observer,
) -> tuple[tuple[Path, ...], ...]:
    """Every output under its partial name. Returns the weight files of each."""
    total = len(partials)
    observe(Event("start", "pack", 0, total))
    started = time.monotonic()
    weights: list[tuple[Path, ...]] = []
    source = prepared.source
    for target, partial in zip(prepared.targets, partials, strict=True):
        packed = {encoder.plan.component: encoder for encoder in encoders}
        written = write_target(partial, target, contents, pipeline=source.pipeline, weightless=packed)
        weights.append(written)
        if not target.format.single_file:
            for name, encoder in packed.items():
                encoder.put_into(partial / name)
            for name, entries in source.companions.items():
                if name in packed:
                    continue
                replace_weights(
                    partial / name,
                    entries,
                    lambda key, of=entries: require_finite(of[key].read(), key, of[key]),
                )
        observe(Event("advance", "pack", len(weights), total, target.format.name, time.monotonic() - started))
    observe(Event("end", "pack", total, total, seconds=time.monotonic() - started))
    return tuple(weights)


def gated(report: ConvertReport, recipe: Recipe) -> ConvertReport:
    """The report, marked with the gates it misses; gates on figures that only `svdq eval` has are left to it."""
    plain = to_json(report)
    figures = {gate: figure_of(gate, plain) for gate in recipe.gates}
    missed = tuple(
        f"{gate} (is {v:.4g})" for gate, v in figures.items() if v is not None and not gate.holds(v)
    )
    later = tuple(
        f"gate {gate} is checked by svdq eval, not here" for gate, v in figures.items() if v is None
    )
    status = "gate-missed" if missed else report.status
    return replace(report, status=status, gates_missed=missed, warnings=(*report.warnings, *later))
