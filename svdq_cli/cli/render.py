"""Reports as JSON for scripts or as tables for people."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.cli.failures import FailureReport
from svdq_cli.cli.several import RecipeRun, SeveralReport
from svdq_cli.errors import CheckFailedError, GateMissedError
from svdq_cli.printable import printable, printable_record
from svdq_cli.records import (
    CalibrateReport,
    CheckReport,
    ConvertReport,
    EvalReport,
    GenerateReport,
    InspectReport,
    LayerSqnr,
    LoraReport,
    PlanReport,
    RepackReport,
    Summary,
    json_text,
)
from svdq_cli.wording import bytes_text

if TYPE_CHECKING:
    from svdq_cli.bench.report import BenchReport, StepRow
    from svdq_cli.diagnosis import DoctorReport
    from svdq_cli.pushing import PushReport
    from svdq_cli.showcase import DemoReport
    from svdq_cli.showcase_lora import LoraDemoReport

WORST_LAYERS = 5


def show(report: object, *, json: bool, verbose: bool = False) -> None:
    """The report on stdout."""
    if json:
        print(json_text(report))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    report = printable_record(report)
    match report:
        case ConvertReport():
            _convert(console, report, verbose)
        case PlanReport():
            _plan(console, report)
        case InspectReport():
            _inspect(console, report, verbose)
        case CalibrateReport():
            console.print(
                f"{report.path}: {report.inputs} layer inputs from {report.prompts} prompts x {report.steps} steps, "
                f"{bytes_text(report.bytes)}, {report.seconds:.1f} s"
            )
            console.print(f"next: svdq convert SOURCE --calib {report.path} -o OUT")
        case RepackReport():
            (output,) = report.outputs
            console.print(
                f"{output.path}: {output.format}, {report.layers} layers with the bits that they had in "
                f"{report.source_format}, {bytes_text(output.bytes)}"
            )
            for warning in report.warnings:
                console.print(f"note: {warning}")
        case LoraReport():
            _lora(console, report, verbose)
        case CheckReport():
            _check(console, report, verbose)
        case EvalReport():
            _evaluate(console, report, verbose)
        case GenerateReport():
            console.print(f"{report.path}: {report.width} x {report.height}, {report.seconds:.1f} s")
            console.print(f"backend: {report.backend}")
        case SeveralReport():
            _several(console, report)
        case _:
            _other(console, report)


def exit_with(report: object) -> None:
    """End with the exit code of what the report, already on stdout, says: a missed gate, problems, the worst recipe."""
    match report:
        case ConvertReport(gates_missed=missed) | EvalReport(gates_missed=missed) if missed:
            _fail(
                GateMissedError.code, f"gates missed: {'; '.join(missed)}", "the outputs are kept and marked"
            )
        case CheckReport(problems=(first, *_) as problems):
            message = f"{len(problems)} problems, the first: {first.layer}: {first.what}"
            _fail(CheckFailedError.code, message, "do not use this checkpoint; convert again")
        case SeveralReport(code=code) if code:
            failed = sum(run.code != 0 for run in report.runs)
            _fail(code, f"{failed} of {len(report.runs)} recipes failed", "the table says which, and why")
        case _:
            if missed := getattr(report, "gates_missed", ()):  # of a benchmark, whose records need torch
                _fail(GateMissedError.code, f"gates missed: {'; '.join(missed)}", "the figures stand above")


def _fail(code: int, message: str, hint: str) -> NoReturn:
    """No failure object follows: the report is the one on stdout."""
    import typer

    print(f"svdq: {printable(message)}\n      {hint}", file=sys.stderr)
    raise typer.Exit(code)


# ------------------------------------------------------------------------------------------------- one per report


def _convert(console: Console, report: ConvertReport, verbose: bool) -> None:
    output = report.outputs[0]
    table = _facts()
    table.add_row("written", output.path)
    table.add_row("format", f"{output.format}, {report.precision}, rank {report.rank.requested}")
    counts = report.layers
    table.add_row("layers", f"{counts.w4a4} W4A4, {counts.w4a16} W4A16, {counts.kept} kept at 16 bit")
    table.add_row("size", _size(report.bytes.input, report.bytes.output, report.bytes.ratio))
    kind = "weights" if report.data_free else "outputs on the calibration rows"
    sqnr = report.layer_sqnr_db
    table.add_row("layer SQNR", f"mean {sqnr.mean:.1f} dB, worst {sqnr.min:.1f} dB ({kind})")
    seconds = report.seconds
    table.add_row(
        "time",
        f"{seconds.total:.1f} s (calibrate {seconds.calibrate:.1f}, solve {seconds.solve:.1f}, "
        f"pack {seconds.pack:.1f}, check {seconds.check:.1f})",
    )
    table.add_row("memory", f"{bytes_text(report.peak.ram_bytes)} RAM" + _vram(report.peak.vram_bytes))
    console.print(table)
    _layers(console, sqnr, everything=verbose)
    console.print(f"next: svdq eval {output.path} --against {_as_typed(report.recipe['model'])}")


def _several(console: Console, report: SeveralReport) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("exit code", "status", "smaller", "layer SQNR", "seconds"):
        table.add_column(title, justify="left" if title == "status" else "right", no_wrap=True)
    table.add_column("recipe", overflow="fold")
    for run in report.runs:
        table.add_row(str(run.code), *_became(run), run.source)
    console.print(table)
    for run in report.runs:
        match run.report:
            case FailureReport(error=error):
                console.print(f"{run.source}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
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
            return plan.status, f"{plan.bytes.ratio:.2f}x", "", ""
        case ConvertReport() as made:
            sqnr, seconds = f"{made.layer_sqnr_db.mean:.1f} dB", f"{made.seconds.total:.1f}"
            return made.status, f"{made.bytes.ratio:.2f}x", sqnr, seconds


def _as_typed(model: object) -> str:
    """A recipe's model as SOURCE and options, the way it would be typed."""
    said = cast("dict[str, object]", model)
    loras = cast("list[dict[str, object]]", said["loras"])
    base = [f"--base {said['base']}"] if said["base"] else []
    return " ".join(
        [str(said["source"]), *base, *(f"--lora {lora['path']}:{lora['weight']}" for lora in loras)]
    )


def _plan(console: Console, report: PlanReport) -> None:
    table = _facts()
    table.add_row(
        "model", f"{report.model.family} ({report.model.model_class}), {_count(report.model.parameters)}"
    )
    counts = report.layers
    table.add_row("layers", f"{counts.w4a4} W4A4, {counts.w4a16} W4A16, {counts.kept} kept at 16 bit")
    table.add_row("size", _size(report.bytes.input, report.bytes.output, report.bytes.ratio))
    table.add_row("disk", bytes_text(report.disk_bytes))
    stages = report.stages
    parts = ", ".join(
        f"{name} {getattr(stages, name):.0f}" for name in ("prepare", "calibrate", "solve", "pack", "check")
    )
    table.add_row("time", f"{report.seconds:.0f} s ({parts})")
    table.add_row("memory", f"{bytes_text(report.ram_bytes)} RAM" + _vram(report.vram_bytes))
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}")


def _inspect(console: Console, report: InspectReport, verbose: bool) -> None:
    facts = _facts()
    facts.add_row("kind", f"{report.kind} ({report.read_as})" if report.read_as else report.kind)
    facts.add_row("model", f"{report.family} ({report.model_class}), {_count(report.parameters)}")
    facts.add_row("format", f"{report.format}, {report.precision}, rank {report.rank}")
    planned = " planned" if report.kind == "source" else ""
    facts.add_row(f"size{planned}", _size(report.bytes.input, report.bytes.output, report.bytes.ratio))
    if report.provenance:
        for key in ("svdq_version", "source_sha256", "calibration_sha256", "fingerprint"):
            facts.add_row(key, str(report.provenance.get(key)))
    console.print(facts)
    table = Table(box=None, pad_edge=False)
    for title in ("role", "rank", "in", "out", "layers" if not verbose else "layer"):
        table.add_column(title, justify="right" if title in ("rank", "in", "out") else "left")
    if verbose:
        for layer in report.layers:
            table.add_row(
                layer.role,
                str(layer.rank or ""),
                str(layer.in_features),
                str(layer.out_features),
                Text(layer.name),
            )
    else:
        groups: dict[tuple[str, int | None, int, int, str], int] = {}
        for layer in report.layers:
            pattern = _any_block(layer.name)
            key = (layer.role, layer.rank, layer.in_features, layer.out_features, pattern)
            groups[key] = groups.get(key, 0) + 1
        shared = {_any_block(layer.name): _any_block(layer.input) for layer in report.layers if layer.input}
        for (role, rank, width, height, pattern), count in groups.items():
            same = shared.get(pattern, pattern)
            reads = (
                ""
                if same == pattern or role == "w4a16"
                else f"  (reads what {same.rsplit('.', 1)[-1]} reads)"
            )
            table.add_row(role, str(rank or ""), str(width), str(height), Text(f"{count} x {pattern}{reads}"))
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}")


def _any_block(name: str) -> str:
    """transformer_blocks.7.attn.to_out.0 -> transformer_blocks.*.attn.to_out.0"""
    stack, *rest = name.split(".")
    return ".".join(
        [stack, *("*" if part.isdigit() and index == 0 else part for index, part in enumerate(rest))]
    )


def _lora(console: Console, report: LoraReport, verbose: bool) -> None:
    (output,) = report.outputs
    table = _facts()
    table.add_row("written", output.path)
    table.add_row("LoRAs", ", ".join(f"{lora.path} at {lora.weight:g}" for lora in report.loras))
    table.add_row("rank", f"{report.rank['before']} -> {report.rank['after']}")
    table.add_row("size", f"{bytes_text(report.bytes['before'])} -> {bytes_text(report.bytes['after'])}")
    table.add_row("time, memory", f"{report.seconds:.1f} s, {bytes_text(report.peak.ram_bytes)} RAM")
    console.print(table)
    counts = Counter((row.how, row.kind or "", row.why or "") for row in report.keys)
    for (how, kind, why), count in counts.items():
        console.print(
            Text(f"  {count:5} {how}" + (f", {kind}" if kind else "") + (f": {why}" if why else ""))
        )
    cut = [row for row in report.keys if row.error is not None]
    for row in report.keys if verbose else sorted(cut, key=lambda row: -(row.error or 0))[:WORST_LAYERS]:
        error = "" if row.error is None else f", cut to a rank: error {row.error:.3f}"
        console.print(Text(f"  {row.how}: {row.key}{error}"))
    worst = sorted(report.layer_error.items(), key=lambda item: -item[1])
    for name, error in worst if verbose else worst[:WORST_LAYERS]:
        console.print(Text(f"  {error:7.4f}  {name} (error of its compressed branch)"))
    for warning in report.warnings:
        console.print(Text(f"note: {warning}"))


def _check(console: Console, report: CheckReport, verbose: bool) -> None:
    if report.problems:
        for problem in report.problems[: None if verbose else 10]:
            console.print(Text(f"{problem.layer}: {problem.what}"))
        return
    console.print(f"ok: {report.layers} layers, format {report.format}")
    if report.layer_error:
        worst = sorted(report.layer_error.items(), key=lambda item: -item[1])
        for name, error in worst if verbose else worst[:WORST_LAYERS]:
            console.print(Text(f"  {error:7.4f}  {name}"))
        console.print("(relative error of the rebuilt weight, worst first)")
    else:
        console.print("structure and finite values; --against SOURCE also compares the weights")


def _evaluate(console: Console, report: EvalReport, verbose: bool) -> None:
    """Means over the pictures, with the columns that something was measured for."""
    table = Table(box=None, pad_edge=False)
    measured = [name for name in _LEARNED if getattr(report, name) is not None]
    table.add_column("against the 16-bit pictures")
    for title in ("PSNR", "95 % interval", "worst", "SSIM", *(_LEARNED[name] for name in measured)):
        table.add_column(title, justify="right")
    titles = {"rtn": "naive 4-bit (rtn)", "nf4": "bitsandbytes NF4"}
    ways = {titles.get(name, name): scores for name, scores in report.baselines.items()}
    for title, scores in {"converted": report, **ways}.items():
        table.add_row(
            title,
            _db(scores.psnr_db),
            _interval(scores.psnr_db),
            f"{scores.psnr_db.min:.1f} dB",
            f"{scores.ssim.mean:.3f}",
            *(_learned(getattr(scores, name)) for name in measured),
        )
    console.print(table)
    floor = report.noise_floor_psnr_db
    repeats = "exactly (100 dB)" if floor is not None and floor >= 100 else f"to {floor:.1f} dB"
    console.print(
        f"{report.images} pictures; the 16-bit model repeats itself {repeats}; {report.seconds:.1f} s"
    )
    for name, why in report.missing.items():
        console.print(Text(f"no {name}: {why}"))
    sqnr = report.layer_sqnr_db
    console.print(f"layer SQNR on these prompts: mean {sqnr.mean:.1f} dB, worst {sqnr.min:.1f} dB")
    _layers(console, sqnr, everything=verbose)
    if report.page:
        console.print(f"report, for a browser: {report.page}")


_LEARNED = {"lpips": "LPIPS", "clip": "CLIP", "image_reward": "ImageReward", "fid": "FID"}


def _learned(figure: Summary | float | None) -> str:
    if figure is None:
        return ""
    return f"{figure:.2f}" if isinstance(figure, (int, float)) else f"{figure.mean:.3f}"


def _interval(summary: Summary) -> str:
    return "" if summary.ci95 is None else "{:.1f} to {:.1f}".format(*summary.ci95)


def _other(console: Console, report: object) -> None:
    name = type(report).__name__
    if name == "DemoReport":
        _demo(console, report)  # type: ignore[arg-type]
    elif name == "LoraDemoReport":
        _lora_demo(console, report)  # type: ignore[arg-type]
    elif name == "DoctorReport":
        _doctor(console, report)  # type: ignore[arg-type]
    elif name == "BenchReport":
        _bench(console, report)  # type: ignore[arg-type]
    elif name == "PushReport":
        _push(console, report)  # type: ignore[arg-type]
    elif name == "InitReport":
        console.print(f"{report.path}: a recipe for family {report.family}")  # type: ignore[attr-defined]
        console.print(f"next: svdq convert {report.path}")  # type: ignore[attr-defined]
    elif name == "ExportReport":
        size = bytes_text(report.bytes)  # type: ignore[attr-defined]
        console.print(f"{report.path}: the embedded model as a diffusers pipeline ({size})")  # type: ignore[attr-defined]
        console.print(
            f"next: svdq calibrate {report.path} -o CALIB --prompts calib_prompts/demo_calibration.txt"  # type: ignore[attr-defined]
        )
    else:
        console.print(json_text(report))


def _push(console: Console, report: PushReport) -> None:
    for file in report.files:
        console.print(f"{bytes_text(file.bytes):>10}  {file.path}")
    verb = "uploaded to" if report.url else "would be uploaded to"
    console.print(
        f"{len(report.files)} files, {bytes_text(report.bytes)}, {verb} {report.url or report.repository}"
    )


def _demo(console: Console, report: DemoReport) -> None:
    source = None
    for row in report.rows:
        if row.source != source:
            source = row.source
            note = (
                ", a stress variant: same pictures, strong activation outliers"
                if "outliers" in source
                else ""
            )
            console.print(Text(f"\n{source}", style="bold").append(note, style="not bold"))
            table = Table(box=None, pad_edge=False)
            for title in ("model", "PSNR", "SSIM", "layer SQNR", "transformer", "smaller", "seconds"):
                table.add_column(title, justify="left" if title == "model" else "right")
            of_source = [other for other in report.rows if other.source == source]
            for other in of_source:
                table.add_row(
                    other.model,
                    _db(other.psnr_db) if other.psnr_db else "",
                    f"{other.ssim.mean:.3f}" if other.ssim else "",
                    f"{other.layer_sqnr_db:.1f} dB" if other.layer_sqnr_db is not None else "",
                    bytes_text(other.bytes),
                    f"{of_source[0].bytes / other.bytes:.2f}x",
                    f"{other.seconds:.1f}" if other.seconds is not None else "",
                )
            console.print(table)
    console.print(
        f"\nPSNR and SSIM against the 16-bit pictures of {report.prompts} held-out prompts, equal seeds."
    )
    w4a4 = [row for row in report.bench.rows if row.op == "w4a4 linear" and row.rank]
    if w4a4:
        slowest, fastest = min(row.ratio for row in w4a4), max(row.ratio for row in w4a4)
        console.print(
            f"Layer speed on {report.bench.device.name} ({report.bench.device.backend} backend): "
            f"{slowest:.2f} to {fastest:.2f} times that of {w4a4[0].baseline}; svdq bench shows more."
        )
    for grid in report.grids:
        console.print(f"pictures: {grid}")
    console.print(f"report, for a browser: {report.page}")
    example = report.checkpoints[0]
    console.print(f"done in {report.seconds:.0f} s")
    console.print(
        f'next: svdq generate {example} --prompt "a large red star above a small blue circle on white" -o star.png'
    )


def _lora_demo(console: Console, report: LoraDemoReport) -> None:
    console.print(f"int4 against 16-bit: {_db(report.base_psnr_db)}")
    console.print(
        f"int4 + folded LoRA against 16-bit + LoRA: {_db(report.lora_psnr_db)} (rank {report.rank})"
    )
    console.print(f"{report.prompts} held-out prompts, equal seeds; folded in {report.fold_seconds:.1f} s")
    console.print(f"pictures: {report.grid}")
    console.print(f"done in {report.seconds:.0f} s")


def _doctor(console: Console, report: DoctorReport) -> None:
    facts = _facts()
    facts.add_row("svdq", report.svdq_version)
    facts.add_row("python", report.python)
    for name, version in report.packages.items():
        facts.add_row(name, version or "not installed")
    facts.add_row(
        "device", f"{report.device['name']}" + (f", sm_{report.device['sm']}" if report.device["sm"] else "")
    )
    console.print(facts)
    table = Table(box=None, pad_edge=False)
    for title in ("op", "precision", "mode", "backend", "status", "detail"):
        table.add_column(title)
    for test in report.tests:
        table.add_row(test.op, test.precision, test.mode, test.backend, test.status, Text(test.detail))
    console.print(table)


def _bench(console: Console, report: BenchReport) -> None:
    facts = _facts()
    device = report.device
    facts.add_row("device", device.name + (f", sm_{device.sm}" if device.sm else ""))
    for name in ("driver", "cuda", "torch", "threads", "backend"):
        if getattr(device, name) is not None:
            facts.add_row(name, str(getattr(device, name)))
    facts.add_row("baseline", report.rows[0].baseline)
    console.print(facts)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for title in ("op", "precision", "M", "K", "N", "R", "us", "spread", "TFLOP/s", "ratio", "error"):
        table.add_column(title, justify="left" if title in ("op", "precision") else "right", no_wrap=True)
    shape = None
    for row in report.rows:
        if shape not in (None, (row.m, row.k, row.n)):
            table.add_row()
        shape = (row.m, row.k, row.n)
        table.add_row(
            row.op.removesuffix(" linear") + (" unfused" if "+" in row.mode else ""),
            row.precision,
            *(str(size) for size in shape),
            "" if row.rank is None else str(row.rank),
            f"{row.us.median:.{1 if row.us.median < 1000 else 0}f}",
            f"{(row.us.p90 - row.us.p10) / row.us.median:.0%}",
            f"{row.tflops:.2g}" if row.tflops < 10 else f"{row.tflops:.0f}",
            f"{row.ratio:.2f}",
            f"{row.relative_error:.1e}",
        )
    console.print(table)
    console.print()
    exact = {f"{row.op} {row.precision}, R {row.rank}": row.exactness for row in report.rows}
    for label, exactness in exact.items():
        console.print(f"{label.removesuffix(', R None')}: {exactness}")
    console.print()
    if report.steps:
        _steps(console, report.steps)
    for note in report.notes:
        console.print(note)


def _steps(console: Console, steps: Sequence[StepRow]) -> None:
    console.print(f"one step of {steps[0].model}, random weights:")
    table = Table(box=None, pad_edge=False)
    for title in ("precision", "mode", "ms", "ratio", "peak GiB", "of bfloat16"):
        table.add_column(title, justify="left" if title in ("precision", "mode") else "right")
    for row in steps:
        table.add_row(
            row.precision,
            row.mode,
            f"{row.us.median / 1000:.2f}",
            f"{row.ratio:.2f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
            "" if row.memory_ratio is None else f"1/{row.memory_ratio:.2f}",
        )
    console.print(table)
    console.print()


# ------------------------------------------------------------------------------------------------- small pieces


def _layers(console: Console, sqnr: LayerSqnr, *, everything: bool) -> None:
    ranked = sorted(sqnr.per_layer.items(), key=lambda item: item[1])
    console.print("all layers, worst first:" if everything else "worst layers:")
    for name, value in ranked if everything else ranked[:WORST_LAYERS]:
        console.print(Text(f"  {value:6.1f} dB  {name}"))


def _facts() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    return table


def _db(summary: Summary) -> str:
    return f"{summary.mean:.1f} dB"


def _size(before: int, after: int, ratio: float) -> str:
    return f"{bytes_text(before)} -> {bytes_text(after)} ({ratio:.2f}x smaller)"


def _count(parameters: int) -> str:
    return (
        f"{parameters / 1e9:.2f} B parameters"
        if parameters >= 1e9
        else f"{parameters / 1e6:.2f} M parameters"
    )


def _vram(count: int | None) -> str:
    return f", {bytes_text(count)} VRAM" if count is not None else ""
