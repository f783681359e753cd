"""A benchmark as a plot: one bar a row, its length the speed relative to the baseline's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from svdq_cli.bench.report import BenchReport, BenchRow
from svdq_cli.storage.images import write_image

LINE, LABEL, BAR, MARGIN = 18, 470, 420, 12  # pixels
INK, BASELINE, OURS, OTHERS = "#202020", "#b0b0b0", "#2a7f62", "#7a93c9"


def draw_plot(report: BenchReport, path: Path) -> None:
    """Writes an image (its type by `path`'s suffix). The dashed line is the baseline, 1.0."""
    rows = list(_lines(report))
    longest = max(1.0, *(row.ratio for row in report.rows))
    height = 2 * MARGIN + LINE * (len(rows) + 2)
    image = Image.new("RGB", (LABEL + BAR + 100 + 2 * MARGIN, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    draw.text(
        (MARGIN, MARGIN), f"{report.device.name}: speed relative to {report.rows[0].baseline}", INK, font
    )
    left = MARGIN + LABEL
    for index, row in enumerate(rows, start=2):
        y = MARGIN + LINE * index
        if isinstance(row, str):
            draw.text((MARGIN, y), row, INK, font)
            continue
        draw.text((MARGIN + 16, y), _label(row), INK, font)
        end = left + BAR * row.ratio / longest
        draw.rectangle((left, y + 2, end, y + LINE - 4), fill=_color(row))
        draw.text((end + 6, y), f"{row.ratio:.2f}   {row.us.median:.0f} us", INK, font)
    at = left + BAR / longest
    for y in range(MARGIN + 2 * LINE, height - MARGIN, 8):
        draw.line((at, y, at, y + 4), fill=INK)
    write_image(path, image)


def _lines(report: BenchReport) -> Iterator[str | BenchRow]:
    """A heading for every shape, then its rows."""
    shape: tuple[int, int, int] | None = None
    for row in report.rows:
        if (row.m, row.k, row.n) != shape:
            shape = (row.m, row.k, row.n)
            yield f"{row.layer}: M {row.m}, K {row.k}, N {row.n}"
        yield row


def _label(row: BenchRow) -> str:
    rank = "" if row.rank is None else f", rank {row.rank}"
    return f"{row.op}, {row.mode}, {row.precision}{rank}"


def _color(row: BenchRow) -> str:
    if row.mode in ("kernels", "reference", "fused"):
        return OURS
    return BASELINE if row.mode == "torch" and row.ratio == 1 else OTHERS
