"""The pipeline in verbs: plan, calibrate, convert, check, inspect.

Each takes a recipe or a path and returns a report record. Nothing here prints; progress goes to `observe`. The verbs
that draw pictures to judge or to keep (evaluate, generate) are in `drawing.py`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from svdq_cli import __version__
from svdq_cli.allocation import allocated
from svdq_cli.calibrate.artefact import (
    CalibrationFacts,
    open_calibration,
    save_calibration,
    statistics_digest,
)
from svdq_cli.calibrate.prompts import prompts_digest
from svdq_cli.checking import find_problems, layer_errors
from svdq_cli.checkpoint import open_checkpoint
from svdq_cli.encoders import quantize_encoder
from svdq_cli.errors import CheckFailedError, InputError, UsageError
from svdq_cli.loading import load_16bit_pipeline
from svdq_cli.locate import portable_name
from svdq_cli.machine import peak_memory, resolve_device
from svdq_cli.preparing import (
    DEFAULT_OPTIONS,
    Prepared,
    RunOptions,
    chosen_prompts,
    disk_bytes,
    draw_settings,
    inspect_layer,
    is_data_free,
    layer_counts,
    layer_sqnr,
    model_facts,
    predicted_sizes,
    prepare,
    rank_facts,
    search_facts,
    sizes_of,
    warnings_of,
)
from svdq_cli.recipe import Recipe, embedded, figure_of, resolved
from svdq_cli.reconstructing import reconstructed, require_blocks_run
from svdq_cli.records import (
    ActivationStats,
    BlockSearch,
    CalibrateReport,
    CheckReport,
    ConvertReport,
    ConvertSeconds,
    Event,
    InspectReport,
    Observer,
    OutputFile,
    PlanReport,
    ignore_events,
    json_text,
    to_json,
)
from svdq_cli.solving import Statistics, finite_tensor, require_finite, solve_model
from svdq_cli.source import Source, file_sha256, source_digest
from svdq_cli.writing import (
    Contents,
    refuse_existing,
    replace_weights,
    report_path,
    require_disk,
    whole_output,
    write_target,
)

# ------------------------------------------------------------------------------------------------- plan, inspect


def predict(
    recipe: Recipe, *, calibration: Path | None = None, options: RunOptions = DEFAULT_OPTIONS
) -> PlanReport:
    """What a conversion would write, from names and shapes alone."""
    prepared = prepare(recipe, beside=options.beside)
    sizes = predicted_sizes(prepared)
    return PlanReport(
        model=model_facts(prepared, None),
        read_as=prepared.source.kind,
        precision=recipe.quantization.precision,
        effort=recipe.quantization.effort,
        rank=rank_facts(prepared),
        layers=layer_counts(prepared.plan),
        bytes=sizes,
        disk_bytes=disk_bytes(prepared),
        seconds=None,
        ram_bytes=None,
        vram_bytes=None,
        recipe=resolved(recipe),
        warnings=warnings_of(prepared, data_free=is_data_free(recipe, calibration)),
    )


def inspect_source(recipe: Recipe, *, options: RunOptions = DEFAULT_OPTIONS) -> InspectReport:
    """What becomes of each layer of a 16-bit model."""
    prepared = prepare(recipe, beside=options.beside)
    planned = {layer.name: layer for layer in prepared.plan.layers}
    input_of = {name: shared.name for shared in prepared.plan.inputs for name in shared.layers}
    return InspectReport(
        kind="source",
        family=prepared.plan.family,
        model_class=prepared.plan.model_class,
        format=prepared.targets[0].format.name,
        precision=recipe.quantization.precision,
        rank=int(recipe.quantization.rank),
        parameters=prepared.plan.parameters,
        layers=tuple(
            inspect_layer(linear, planned.get(linear.name), input_of) for linear in prepared.inventory.linears
        ),
        bytes=predicted_sizes(prepared),
        provenance=None,
        read_as=prepared.source.kind,
        warnings=prepared.source.warnings,
    )


def inspect_checkpoint(path: Path) -> InspectReport:
    """What a converted checkpoint holds, from its headers."""
    checkpoint = open_checkpoint(path)
    planned = {layer.name: layer for layer in checkpoint.layers}
    linears = [plan.linear for plan in checkpoint.layers] + list(checkpoint.kept)
    return InspectReport(
        kind="checkpoint",
        family=checkpoint.family,
        model_class=checkpoint.model_class,
        format=checkpoint.format.name,
        precision=checkpoint.precision.name if checkpoint.precision else None,
        rank=checkpoint.rank,
        parameters=checkpoint.parameters,
        layers=tuple(inspect_layer(linear, planned.get(linear.name)) for linear in linears),
        bytes=sizes_of(checkpoint.state, checkpoint.source.bytes),
        provenance=checkpoint.provenance,
    )


# ------------------------------------------------------------------------------------------------- calibrate


def calibrate(
    recipe: Recipe, out: Path, *, options: RunOptions = DEFAULT_OPTIONS, observe: Observer = ignore_events
) -> CalibrateReport:
    """Draw the calibration prompts with the 16-bit model and keep what its layers saw."""
    started = time.monotonic()
    refuse_existing(out, overwrite=options.overwrite)
    prepared = prepare(recipe, beside=options.beside, every_layer=True)
    stats, facts = _draw_statistics(prepared, options, observe, source_sha256=source_digest(prepared.source))
    manifest = save_calibration(out, stats, facts, overwrite=options.overwrite)
    return CalibrateReport(
        path=str(out),
        inputs=len(stats),
        prompts=facts.prompts_count,
        steps=facts.settings.steps,
        tokens_seen=sum(item.tokens_seen for item in stats.values()),
        bytes=manifest.bytes,
        digest=manifest.digest,
        seconds=time.monotonic() - started,
    )


def _draw_statistics(
    prepared: Prepared, options: RunOptions, observe: Observer, *, source_sha256: str
) -> tuple[dict[str, ActivationStats], CalibrationFacts]:
    from svdq_cli.calibrate.collect import collect_stats

    wanted = prepared.recipe.calibration
    if wanted is None:
        raise UsageError("the recipe names no calibration prompts", hint="give --prompts FILE")
    if prepared.source.pipeline is None:
        raise InputError(
            f"{prepared.source.path}: calibration draws pictures, and this is one component, not a pipeline",
            hint="give the pipeline that it belongs to (--base FOLDER_OR_HUB_ID), or use --effort datafree",
            where=str(prepared.source.path),
        )
    prompts = chosen_prompts(prepared.recipe, options, observe)
    settings = draw_settings(prepared.recipe, prepared.source, beside=options.beside)
    device = resolve_device(options.device)
    pipe = load_16bit_pipeline(prepared.source, class_name=prepared.plan.model_class, device=device)
    model = getattr(pipe, prepared.source.component)
    stats = collect_stats(
        pipe, model, prepared.plan.inputs, prompts, draw=settings, rows=wanted.rows, observe=observe
    )
    facts = CalibrationFacts(
        svdq_version=__version__,
        model_class=prepared.plan.model_class,
        family=prepared.plan.family,
        source_sha256=source_sha256,
        settings=settings,
        prompts_sha256=prompts_digest(prompts),
        prompts_count=len(prompts),
    )
    return stats, facts


# ------------------------------------------------------------------------------------------------- convert


def convert(
    recipe: Recipe,
    out: Path | tuple[Path, ...],
    *,
    calibration: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> ConvertReport:
    """Search, quantize, pack, check. `out`: one path for each of the recipe's outputs.

    All outputs are packed from one search. None appears under its name before all are whole and checked.
    """
    started = time.monotonic()
    paths = (out,) if isinstance(out, Path) else out
    for path in paths:
        refuse_existing(path, overwrite=options.overwrite)
    prepared = prepare(recipe, beside=options.beside)
    if not prepared.source.tensors:
        raise InputError(
            f"{prepared.source.path}: there are no weights here, only a config",
            hint="give the folder that holds the weights",
            where=str(prepared.source.path),
        )
    require_disk(paths[0], disk_bytes(prepared))
    digest = source_digest(prepared.source)
    data_free = is_data_free(recipe, calibration)
    tunes_blocks = recipe.quantization.effort == "best" and not data_free
    if tunes_blocks:
        require_blocks_run(prepared)
    warnings = warnings_of(prepared, data_free=data_free)
    _warned(warnings, observe)

    clock = _Clock()
    statistics = _statistics(prepared, calibration, options, observe, digest) if not data_free else None
    calibrate_seconds = clock.lap()
    device = resolve_device(options.device)
    prepared, more = allocated(prepared, statistics, device, observe)
    warnings += _warned(more, observe)
    solutions, reports = solve_model(prepared, statistics, device, observe)
    blocks: dict[str, BlockSearch] = {}
    if tunes_blocks and statistics is not None:
        solutions, reports, blocks = reconstructed(
            prepared, statistics, solutions, reports, options=options, device=device, observe=observe
        )
    solve_seconds = clock.lap()

    provenance = {
        "svdq_version": __version__,
        "recipe": embedded(recipe, source=portable_name(recipe.model.source, digest, beside=options.beside)),
        "source_sha256": digest,
        "calibration_sha256": statistics.digest if statistics else None,
    }
    fingerprint = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()
    contents = Contents(
        config=prepared.source.config,
        solutions=solutions,
        kept=lambda name: finite_tensor(prepared.source, name),
        provenance={
            **provenance,
            "fingerprint": fingerprint,
            "weight_error": {report.name: round(report.weight_error, 5) for report in reports},
        },
    )
    with ExitStack() as stack:
        partials = [stack.enter_context(whole_output(p, overwrite=options.overwrite)) for p in paths]
        weights = _pack(prepared, partials, contents, observe)
        pack_seconds = clock.lap()
        for partial in partials:
            _require_sound(partial, prepared.source, observe)
        check_seconds = clock.lap()
        report = ConvertReport(
            status="ok",
            outputs=tuple(
                OutputFile(target.format.name, str(path), file.stat().st_size, file_sha256(file))
                for target, path, file in zip(prepared.targets, paths, weights, strict=True)
            ),
            model=model_facts(prepared, digest),
            read_as=prepared.source.kind,
            precision=recipe.quantization.precision,
            effort="datafree" if data_free else recipe.quantization.effort,
            data_free=data_free,
            rank=rank_facts(prepared),
            layers=layer_counts(prepared.plan),
            layer_sqnr_db=layer_sqnr(reports),
            search=search_facts(reports, blocks),
            bytes=sizes_of(prepared.inventory.state, weights[0].stat().st_size),
            seconds=ConvertSeconds(
                calibrate_seconds, solve_seconds, pack_seconds, check_seconds, time.monotonic() - started
            ),
            peak=peak_memory(),
            fingerprint=fingerprint,
            svdq_version=__version__,
            recipe=resolved(recipe),
            warnings=warnings,
        )
        report = _gated(report, recipe)
        for target, partial in zip(prepared.targets, partials, strict=True):
            if not target.format.single_file:
                _write_report(report_path(partial, target.format), report)
    for target, path in zip(prepared.targets, paths, strict=True):
        if target.format.single_file:
            _write_report(report_path(path, target.format), report)
    return report


def _warned(warnings: tuple[str, ...], observe: Observer) -> tuple[str, ...]:
    for warning in warnings:
        observe(Event("warning", "convert", detail=warning))
    return warnings


def _pack(
    prepared: Prepared, partials: Sequence[Path], contents: Contents, observe: Observer
) -> tuple[Path, ...]:
    """Every output under its partial name. Returns the weight files."""
    total = len(partials)
    observe(Event("start", "pack", 0, total))
    started = time.monotonic()
    weights: list[Path] = []
    for target, partial in zip(prepared.targets, partials, strict=True):
        source = prepared.source
        weights.append(
            write_target(partial, target, contents, pipeline=source.pipeline, component=source.component)
        )
        if not target.format.single_file:
            for name in prepared.recipe.components:
                quantize_encoder(partial / name, dtype=prepared.settings.dtype)
        if not target.format.single_file:
            for name, entries in source.companions.items():
                own = {key: require_finite(entry.read(), key, entry) for key, entry in entries.items()}
                replace_weights(partial / name, own)
        observe(Event("advance", "pack", len(weights), total, target.format.name, time.monotonic() - started))
    observe(Event("end", "pack", total, total, seconds=time.monotonic() - started))
    return tuple(weights)


def _write_report(path: Path, report: ConvertReport) -> None:
    path.write_text(json_text(report) + "\n", encoding="utf-8")


def _statistics(
    prepared: Prepared, calibration: Path | None, options: RunOptions, observe: Observer, digest: str
) -> Statistics:
    if calibration is None:
        stats, facts = _draw_statistics(prepared, options, observe, source_sha256=digest)
        return Statistics(statistics_digest(stats, facts), stats)
    opened = open_calibration(calibration)
    made_for = opened.manifest.facts
    if made_for.source_sha256 != digest:
        raise InputError(
            f"{calibration}: this calibration was made with other weights ({made_for.model_class}, "
            f"sha256 {str(made_for.source_sha256)[:12]}), not with {prepared.source.path} ({digest[:12]})",
            hint="run svdq calibrate on this model",
            where=str(calibration),
        )
    return Statistics(opened.digest, opened)


def _gated(report: ConvertReport, recipe: Recipe) -> ConvertReport:
    """Mark the report with the gates it misses; gates on figures that only `svdq eval` has are left to it."""
    plain = to_json(report)
    figures = {gate: figure_of(gate, plain) for gate in recipe.gates}
    missed = tuple(
        f"{gate} (is {v:.4g})" for gate, v in figures.items() if v is not None and not gate.holds(v)
    )
    later = tuple(f"gate {gate} is judged by svdq eval, not here" for gate, v in figures.items() if v is None)
    status = "gate-missed" if missed else report.status
    return replace(report, status=status, gates_missed=missed, warnings=(*report.warnings, *later))


# ------------------------------------------------------------------------------------------------- check


def check(path: Path, *, against: Source | None = None, observe: Observer = ignore_events) -> CheckReport:
    """Structure, finite values and, with the source at hand, how well each layer rebuilds its weight."""
    checkpoint = open_checkpoint(path)
    problems = find_problems(checkpoint)
    errors: dict[str, float] | None = None
    if against is not None and not problems:
        errors, wrong = layer_errors(checkpoint, against, observe)
        problems = [*problems, *wrong]
    return CheckReport(
        status="failed" if problems else "ok",
        format=checkpoint.format.name,
        layers=len(checkpoint.layers),
        problems=tuple(problems),
        layer_error=errors,
    )


def _require_sound(partial: Path, source: Source, observe: Observer) -> None:
    report = check(partial, against=source, observe=observe)
    if report.problems:
        first = report.problems[0]
        raise CheckFailedError(
            f"the self-check of the written checkpoint failed: {first.layer}: {first.what}"
            + (f" (and {len(report.problems) - 1} more problems)" if len(report.problems) > 1 else ""),
            hint="nothing was left under the final name; please report this with the recipe",
            where=first.layer,
        )


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds
