"""Of `svdq demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.bench.report import layer_ratios
from svdq_cli.cli.pages.shared import db_text
from svdq_cli.text import bytes_text

if TYPE_CHECKING:
    from svdq_cli.entrypoints.demo import DemoReport
    from svdq_cli.entrypoints.demo_lora import LoraDemoReport


def demo(console: Console, report: DemoReport) -> None:
    source = None
    for row in report.rows:
        if row.source != source:
            source = row.source
            note = (
                ", a stress variant: same images, strong activation outliers" if "outliers" in source else ""
            )
            console.print(Text(f"\n{source}", style="bold").append(note, style="not bold"))
            table = Table(box=None, pad_edge=False)
            for title in ("model", "PSNR", "SSIM", "layer SQNR*", "transformer", "smaller", "seconds"):
                table.add_column(title, justify="left" if title == "model" else "right")
            of_source = [other for other in report.rows if other.source == source]
            for other in of_source:
                table.add_row(
                    other.model,
                    db_text(other.psnr_db) if other.psnr_db else "",
                    f"{other.ssim.mean:.3f}" if other.ssim else "",
                    f"{other.layer_sqnr_db:.1f} dB" if other.layer_sqnr_db is not None else "",
                    bytes_text(other.bytes),
                    f"{of_source[0].bytes / other.bytes:.2f}x",
                    f"{other.seconds:.1f}" if other.seconds is not None else "",
                )
            console.print(table)
    console.print(
        f"\nPSNR and SSIM against the 16-bit images of {report.prompts} held-out prompts, equal seeds.\n"
        "* On the activations of calibration; the HTML report has it on the held-out prompts."
    )
    w4a4 = [row for row in layer_ratios(report.bench.rows) if row.rank]
    if w4a4:
        slowest, fastest = min(row.ratio for row in w4a4), max(row.ratio for row in w4a4)
        console.print(
            f"Speed of 4-bit layers on {report.bench.device.name} ({report.bench.device.backend} backend), roughly: "
            f"{slowest:.2f} to {fastest:.2f} times that of {w4a4[0].baseline}; svdq bench measures it."
        )
    for grid in report.grids:
        console.print(f"images: {grid}")
    console.print(f"HTML report: {report.page}")
    example = report.checkpoints[0]
    console.print(f"done in {report.seconds:.0f} s")
    console.print(
        f'next: svdq generate {example} --prompt "a large red star above a small blue circle on white" -o star.png'
    )


def lora_demo(console: Console, report: LoraDemoReport) -> None:
    console.print(f"int4 against 16-bit: {db_text(report.base_psnr_db)}")
    console.print(
        f"int4 + folded LoRA against 16-bit + LoRA: {db_text(report.lora_psnr_db)} (rank {report.rank})"
    )
    console.print(f"{report.prompts} held-out prompts, equal seeds; folded in {report.fold_seconds:.1f} s")
    console.print(f"images: {report.grid}")
    console.print(f"done in {report.seconds:.0f} s")
