"""Of `svdq check` and `svdq eval`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.cli.pages.shared import WORST_LAYERS, db_text, frames_text, print_layers
from svdq_cli.metrics import METRICS, Metric
from svdq_cli.reports import BASELINE_TITLES, CheckReport, EvalPlanReport, EvalReport, Summary, video_columns
from svdq_cli.text import seconds_text


def check(console: Console, report: CheckReport, verbose: bool) -> None:
    if report.problems:
        for problem in report.problems[: None if verbose else 10]:
            console.print(Text(f"{problem.layer}: {problem.what}"))
        return
    console.print(f"ok: {report.layers} layers, format {report.format}")
    if report.layer_error:
        if report.same_source:
            console.print("the 16-bit model is the one that the checkpoint was made from (same digest)")
        noted = report.noted_error or {}
        beside = "; next to it what the conversion noted" if noted else ""
        console.print(f"relative error of the reconstructed weight, worst first{beside}:")
        worst = sorted(report.layer_error.items(), key=lambda item: -item[1])
        for name, error in worst if verbose else worst[:WORST_LAYERS]:
            columns = [f"{error:7.4f}"]
            if noted:
                columns.append(f"{noted[name]:7.4f}" if name in noted else " " * 7)
            console.print(Text("  " + "  ".join([*columns, name])))
    else:
        console.print("structure and finite values; --against SOURCE also compares the weights")


def evaluation(console: Console, report: EvalReport, verbose: bool) -> None:
    """The verdict last, where the eye stays; means over the images or videos before it, with the columns that something
    was measured for."""
    table = Table(box=None, pad_edge=False)
    measured = [
        metric
        for key, metric in METRICS.items()
        if key not in _OWN_COLUMNS and report.figures[key] is not None
    ]
    what = "video" if report.video else "image"
    table.add_column(f"against the 16-bit {what}s")
    empty = report.sixteen_bit_images.meaningless
    for title in (
        "PSNR (means nothing here)" if empty else "PSNR",
        "95 % interval",
        "worst",
        "SSIM",
        *(metric.title for metric in measured),
    ):
        table.add_column(title, justify="right")
    ways = {BASELINE_TITLES.get(name, name): scores.figures for name, scores in report.baselines.items()}
    for title, figures in {"converted": report.figures, **ways}.items():
        psnr, ssim = figures["psnr_db"], figures["ssim"]
        assert isinstance(psnr, Summary)
        assert isinstance(ssim, Summary)
        table.add_row(
            title,
            db_text(psnr),
            _interval(psnr),
            f"{psnr.min:.1f} dB",
            f"{ssim.mean:.3f}",
            *(_learned(metric, figures[metric.key]) for metric in measured),
        )
    console.print(table)
    if report.video is not None:
        _videos(console, report)
    console.print(
        f"{report.images} {what}{'s' * (report.images != 1)}, {report.seconds:.1f} s{_chance(report)}"
    )
    if (outputs := report.output_sqnr_db) is not None:
        console.print(
            f"model output at equal inputs: {outputs.step:.1f} dB a step, {outputs.sum:.1f} dB summed over the steps"
        )
    for name, why in report.missing.items():
        console.print(Text(f"no {name}: {why}"))
    sqnr = report.layer_sqnr_db
    console.print(f"layer SQNR on these prompts: mean {sqnr.mean:.1f} dB, worst {sqnr.min:.1f} dB")
    print_layers(console, sqnr, everything=verbose)
    if report.page:
        console.print(f"HTML report: {report.page}")
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="bold"))
    console.print(Text(f"verdict: {report.verdict}", style="bold"))
    console.print(Text(f"next: {report.next}"))


def _videos(console: Console, report: EvalReport) -> None:
    """What a table of images has no columns for."""
    ways = {BASELINE_TITLES.get(name, name): scores.video for name, scores in report.baselines.items()}
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{report.video.frames} frames a video" if report.video else "")
    for heading, _, _ in video_columns(report.video):
        table.add_column(heading, justify="right")
    for title, video in {"converted": report.video, **ways}.items():
        cells = [f"{value.mean:.{digits - 1}f}" for _, value, digits in video_columns(video)]
        table.add_row(title, *cells)
    console.print(table)


def evaluation_plan(console: Console, report: EvalPlanReport) -> None:
    what = "image" if report.frames == 1 else "video"
    console.print(
        f"{report.images} {what}{'s' * (report.images != 1)} of {report.width} x {report.height} pixels, "
        f"{frames_text(report.frames)}{report.steps} steps"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("pass", overflow="fold")
    for title in (f"{what}s", "about", "--without"):
        table.add_column(title, justify="left" if title == "--without" else "right", no_wrap=True)
    table.add_column("purpose", overflow="fold")
    for one in report.passes:
        table.add_row(one.title, str(one.images), _range(one.seconds), one.key or "", one.why)
    console.print(table)
    for name, why in report.missing.items():
        console.print(Text(f"no {name}: {why}"))
    console.print(Text(f"total {_range(report.seconds)}: {report.basis}"))


def _range(seconds: tuple[float, float] | None) -> str:
    return "unknown" if seconds is None else f"{seconds_text(seconds[0])} to {seconds_text(seconds[1])}"


def _chance(report: EvalReport) -> str:
    """How much of a difference comes by chance."""
    floor, own = report.noise_floor_psnr_db, report.own_noise_psnr_db
    repeats = "" if floor is None else "exactly (100 dB)" if floor >= 100 else f"to {floor:.1f} dB"
    said = f"; the 16-bit model repeats itself {repeats}" if repeats else ""
    if own is not None:
        nudge = "nothing" if own >= 100 else f"PSNR {own:.1f} dB"
        what = "videos" if report.video else "images"
        said += f"; 4-bit {what} from start noise off by one rounding differ by {nudge}"
    return said


_OWN_COLUMNS = ("psnr_db", "ssim")


def _learned(metric: Metric, figure: Summary | float | None) -> str:
    if figure is None:
        return ""
    return metric.text(figure.mean if isinstance(figure, Summary) else figure)


def _interval(summary: Summary) -> str:
    return "" if summary.ci95 is None else "{:.1f} to {:.1f}".format(*summary.ci95)
