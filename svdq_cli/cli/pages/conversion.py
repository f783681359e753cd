"""Of `svdq convert` and what else writes a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePath
from typing import cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.cli.failures import FailureReport
from svdq_cli.cli.pages.shared import (
    WORST_LAYERS,
    count_text,
    encoder_rows,
    facts_table,
    frames_text,
    loras_text,
    print_layers,
    size_text,
    typed,
    vram_text,
)
from svdq_cli.cli.several import RecipeRun, SeveralReport, said_of
from svdq_cli.formats import format_named
from svdq_cli.prepare.facts import layers_text
from svdq_cli.recipe import Recipe
from svdq_cli.reports import (
    CalibrateReport,
    ConvertReport,
    ErrorFacts,
    GpuFacts,
    LoraKey,
    LoraReport,
    PlanReport,
    RepackReport,
)
from svdq_cli.text import bare_name, bytes_text, counted, seconds_text


def conversion(console: Console, report: ConvertReport, verbose: bool) -> None:
    table = facts_table()
    for output in report.outputs:
        table.add_row("written", output.path)
        branch = f"rank {report.rank.requested}" if report.rank.max else "no low-rank branch"
        table.add_row("format", f"{output.format}, {report.precision}, {branch}")
    counts = report.layers
    table.add_row("layers", layers_text(counts))
    table.add_row("size", size_text(report.bytes.input, report.bytes.output, report.bytes.ratio))
    for row in encoder_rows(report.text_encoders):
        table.add_row(*row)
    kind = "weights" if report.data_free else "outputs on the calibration rows"
    sqnr = report.layer_sqnr_db
    table.add_row("layer SQNR", f"mean {sqnr.mean:.1f} dB, worst {sqnr.min:.1f} dB ({kind})")
    seconds = report.seconds
    table.add_row(
        "time",
        f"{seconds.total:.1f} s (calibrate {seconds.calibrate:.1f}, solve {seconds.solve:.1f}, "
        f"pack {seconds.pack:.1f}, check {seconds.check:.1f})",
    )
    table.add_row("memory", f"{bytes_text(report.peak.ram_bytes)} RAM" + vram_text(report.peak.vram_bytes))
    console.print(table)
    print_layers(console, sqnr, everything=verbose)
    source = as_typed(report.recipe["model"])
    console.print(f"next: {typed('svdq', 'eval', report.outputs[0].path, '--against', *source)}")
    for output in report.outputs:
        fmt, name = format_named(output.format), PurePath(output.path).name
        if (said := fmt.naming(name, report.model.family, report.precision, report.rank.max)) is not None:
            console.print(said)


def several(console: Console, report: SeveralReport) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("exit code", "status", "smaller", "layer SQNR", "seconds"):
        table.add_column(title, justify="left" if title == "status" else "right", no_wrap=True)
    table.add_column("recipe", overflow="fold")
    for run in report.runs:
        table.add_row(str(run.code), *_became(run), run.source)
    console.print(table)
    for run in report.runs:
        match run.report:
            case FailureReport(error=error) | PlanReport(error=ErrorFacts() as error):
                console.print(said_of(run.source, error.message) + (f" ({error.hint})" if error.hint else ""))
            case ConvertReport(gates_missed=missed) if missed:
                console.print(f"{run.source}: gates missed: {'; '.join(missed)}")
            case _:
                pass


def _became(run: RecipeRun) -> tuple[str, str, str, str]:
    """Status, size ratio, mean layer SQNR, seconds of one recipe; what is not there is empty."""
    match run.report:
        case FailureReport(error=error):
            return error.kind, "", "", ""
        case PlanReport() as plan:
            return plan.error.kind if plan.error else plan.status, f"{plan.bytes.ratio:.2f}x", "", ""
        case ConvertReport() as made:
            sqnr, seconds = f"{made.layer_sqnr_db.mean:.1f} dB", f"{made.seconds.total:.1f}"
            return made.status, f"{made.bytes.ratio:.2f}x", sqnr, seconds


def as_typed(model: object) -> list[str]:
    """A recipe's model as SOURCE and options, the way it would be typed."""
    said = cast("dict[str, object]", model)
    loras = cast("list[dict[str, object]]", said["loras"])
    base = ["--base", str(said["base"])] if said["base"] else []
    adapters = [
        word
        for lora in loras
        for component in [f":{lora['component']}" if "component" in lora else ""]
        for word in ("--lora", f"{lora['path']}:{lora['weight']}{component}")
    ]
    return [str(said["source"]), *base, *adapters]


def after_calibration(source: str, recipe: Recipe, path: str) -> str:
    """The command that converts with a calibration. `source`: as it was typed, a recipe's name or file, or a model."""
    words = as_typed(recipe.model.model_dump(mode="json")) if recipe.model.source == source else [source]
    made = f"{bare_name(recipe.model.source)}-{recipe.quantization.precision}"
    out = [] if any(output.path for output in recipe.outputs) else ["-o", made]
    return typed("svdq", "convert", *words, "--calib", path, *out)


def plan(console: Console, report: PlanReport) -> None:
    table = facts_table()
    table.add_row(
        "model", f"{report.model.family} ({report.model.model_class}), {count_text(report.model.parameters)}"
    )
    counts = report.layers
    table.add_row("layers", layers_text(counts))
    table.add_row("size", size_text(report.bytes.input, report.bytes.output, report.bytes.ratio))
    if (budget := report.size_budget) is not None:
        table.add_row(
            "budget",
            f"{bytes_text(budget.wanted)}, of which {bytes_text(budget.least)} are needed; what the other "
            f"{bytes_text(budget.left)} go to is measured while converting",
        )
    for row in encoder_rows(report.text_encoders):
        table.add_row(*row)
    if (prompts := report.prompts) is not None:
        table.add_row("prompts", f"{prompts.used} of {prompts.available} from {prompts.read_from}")
    if (sampled := report.sampling) is not None:
        what = "an image" if sampled.frames == 1 else "a video"
        table.add_row(
            "sampling",
            f"{sampled.width} x {sampled.height} pixels, {frames_text(sampled.frames)}"
            f"{counted(sampled.steps, 'step')}, {sampled.tokens:,} tokens {what}",
        )
    kept = f", of which {bytes_text(report.disk_kept_bytes)} are there" if report.disk_kept_bytes else ""
    table.add_row("disk", bytes_text(report.disk_bytes) + kept)
    stages = report.stages
    parts = ", ".join(
        f"{name} {getattr(stages, name):.0f}" for name in ("prepare", "calibrate", "solve", "pack", "check")
    )
    table.add_row("time", f"{seconds_text(report.seconds)} ({parts} s)")
    table.add_row("memory", f"{bytes_text(report.ram_bytes)} RAM" + vram_text(report.vram_bytes))
    console.print(table)
    if report.gpu is not None:
        _on_card(console, report.gpu)
    for warning in report.warnings:
        console.print(f"warning: {warning}")


def _on_card(console: Console, gpu: GpuFacts) -> None:
    convert, generate = gpu.convert, gpu.generate
    table = facts_table()
    table.add_row("on", f"{gpu.name}, {gpu.memory_bytes / 2**30:.3g} GiB")
    taken = ", ".join(
        [bytes_text(convert.peak_bytes), *map(_range_text, [convert.seconds] if convert.seconds else [])]
    )
    lacking = convert.lack or bytes_text(convert.peak_bytes)
    table.add_row("convert", f"fits, {taken}" if convert.fits else f"does not fit: {lacking}")
    if generate.fits:
        fits = f"fits, {bytes_text(generate.peak_bytes)}"
    elif generate.fits_with_offload:
        fits = (
            f"fits with enable_model_cpu_offload(), {bytes_text(generate.offload_peak_bytes)} "
            f"({bytes_text(generate.peak_bytes)} without)"
        )
    else:
        fits = f"does not fit: {bytes_text(generate.offload_peak_bytes)} with enable_model_cpu_offload()"
    table.add_row("generate", fits)
    table.add_row("basis", gpu.basis)
    console.print(table)


def _range_text(seconds: tuple[float, float]) -> str:
    return f"{seconds_text(seconds[0])} to {seconds_text(seconds[1])}"


def calibration(console: Console, report: CalibrateReport) -> None:
    covariances = f"covariances of {report.covariances} of them, " if report.covariances else ""
    console.print(
        f"{report.path}: {report.inputs} layer inputs from {counted(report.prompts, 'prompt')} x "
        f"{counted(report.steps, 'step')}, {covariances}"
        f"{bytes_text(report.bytes)}, {report.seconds:.1f} s"
    )
    console.print(Text(f"next: {report.next}"))


def repacking(console: Console, report: RepackReport) -> None:
    (output,) = report.outputs
    console.print(
        f"{output.path}: {output.format}, {report.layers} layers with the same bits as in "
        f"{report.source_format}, {bytes_text(output.bytes)}"
    )
    for warning in report.warnings:
        console.print(f"note: {warning}")


def lora(console: Console, report: LoraReport, verbose: bool) -> None:
    (output,) = report.outputs
    table = facts_table()
    table.add_row("written", output.path)
    table.add_row("LoRAs", loras_text(report.loras))
    table.add_row("rank", f"{report.rank['before']} -> {report.rank['after']}")
    apart = output.format != report.source_format  # a LoRA file for the checkpoint, which stays as it is
    before = "" if apart else f"{bytes_text(report.bytes['before'])} -> "
    table.add_row("size", before + bytes_text(report.bytes["after"]))
    table.add_row("time, memory", f"{report.seconds:.1f} s, {bytes_text(report.peak.ram_bytes)} RAM")
    console.print(table)
    changed: dict[tuple[str, str, str], list[LoraKey]] = defaultdict(list)
    for row in report.keys:
        changed[row.how, row.kind or "", row.why or ""].append(row)
    for (how, kind, why), rows in changed.items():
        # Of the model: a fused matrix is one layer of the file, and three of the model
        names = {name for row in rows for name in row.layers}
        what = counted(len(names), "layer") if names else counted(len(rows), "tensor")
        console.print(
            Text(f"     {what} {how}" + (f" ({kind})" if kind else "") + (f": {why}" if why else ""))
        )
    cut = [row for row in report.keys if row.error is not None]
    for row in report.keys if verbose else sorted(cut, key=lambda row: -(row.error or 0))[:WORST_LAYERS]:
        error = "" if row.error is None else f", reduced to a lower rank: error {row.error:.3f}"
        console.print(Text(f"  {row.how}: {row.key}{error}"))
    worst = sorted(report.layer_error.items(), key=lambda item: -item[1])
    for name, error in worst if verbose else worst[:WORST_LAYERS]:
        console.print(Text(f"  {error:7.4f}  {name} (error of its compressed branch)"))
    for warning in report.warnings:
        console.print(Text(f"note: {warning}"))
    if report.next is not None:
        console.print(Text(f"next: {report.next}"))
