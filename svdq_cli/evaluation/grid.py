"""A contact sheet: one row per prompt, one column per way of sampling it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

# Pillow's own font (Aileron), so that the sheet looks the same on every machine.
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_PAPER, _INK, _SOFT_INK, _EDGE = "#fbfaf7", "#1d2126", "#6f757d", "#d9d5cc"
_LINE = 1.35  # line height over font size


@dataclass(frozen=True, slots=True)
class _Layout:
    """All lengths in pixels, all in proportion to one image's width."""

    columns: int
    rows: int
    width: int  # of one image
    height: int
    margin: int
    gap: int
    prompt_width: int
    header_height: int
    title_size: int
    text_size: int

    @property
    def size(self) -> tuple[int, int]:
        across = self.prompt_width + self.columns * (self.width + self.gap)
        down = self.header_height + self.rows * self.height + (self.rows - 1) * self.gap
        return across + 2 * self.margin, down + 2 * self.margin

    def corner(self, row: int, column: int) -> tuple[int, int]:
        x = self.margin + self.prompt_width + self.gap + column * (self.width + self.gap)
        return x, self.margin + self.header_height + row * (self.height + self.gap)


def image_grid(
    columns: Sequence[tuple[str, Sequence[Image.Image]]], prompts: Sequence[str], *, scale: int = 2
) -> Image.Image:
    """The sheet, RGB. `columns` are (title, one image per prompt); what follows a line break in a title is set
    smaller ("SVDQuant int4\\n22.1 dB"). Images of one size, enlarged `scale` times. ValueError where counts or
    sizes differ.
    """
    _check(columns, prompts)
    layout = _layout_of(columns, len(prompts), scale)
    sheet = Image.new("RGB", layout.size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (title, images) in enumerate(columns):
        _draw_title(draw, layout, index, title)
        for row, image in enumerate(images):
            _paste(sheet, draw, layout, layout.corner(row, index), image)
    for row, prompt in enumerate(prompts):
        _draw_prompt(draw, layout, row, prompt)
    return sheet


def _check(columns: Sequence[tuple[str, Sequence[Image.Image]]], prompts: Sequence[str]) -> None:
    if not columns or not prompts:
        raise ValueError("an image grid needs at least one column and one prompt")
    for title, images in columns:
        if len(images) != len(prompts):
            raise ValueError(f"column {title!r} has {len(images)} images for {len(prompts)} prompts")
    sizes = {image.size for _, images in columns for image in images}
    if len(sizes) > 1:
        raise ValueError(f"images of different sizes: {sorted(sizes)}")


def _layout_of(columns: Sequence[tuple[str, Sequence[Image.Image]]], rows: int, scale: int) -> _Layout:
    first = columns[0][1][0]
    width, height = first.width * scale, first.height * scale
    title_size = _fitting_size([line for title, _ in columns for line in title.splitlines()], width)
    lines = max(len(title.splitlines()) for title, _ in columns)
    return _Layout(
        columns=len(columns),
        rows=rows,
        width=width,
        height=height,
        margin=max(12, width // 7),
        gap=max(4, width // 16),
        prompt_width=width,
        header_height=round(lines * title_size * _LINE + title_size * 0.6),
        title_size=title_size,
        text_size=max(10, round(width / 13)),
    )


def _fitting_size(lines: Sequence[str], width: int) -> int:
    """The largest title size, up to an eleventh of the image's width, at which every line fits above it."""
    size = max(10, round(width / 11))
    while size > 8 and any(ImageFont.load_default(size).getbbox(line)[2] > width for line in lines):
        size -= 1
    return size


def _draw_title(draw: ImageDraw.ImageDraw, layout: _Layout, column: int, title: str) -> None:
    left, top = layout.corner(0, column)
    lines = title.splitlines()
    # The last line is just above the images, so that one-line titles of a two-line header do too.
    y = top - layout.title_size * 0.6 - len(lines) * layout.title_size * _LINE
    for index, line in enumerate(lines):
        size = layout.title_size if index == 0 else round(layout.title_size * 0.85)
        font = ImageFont.load_default(size)
        draw.text((left + layout.width / 2, y), line, _INK if index == 0 else _SOFT_INK, font, anchor="ma")
        y += layout.title_size * _LINE


def _paste(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    layout: _Layout,
    corner: tuple[int, int],
    image: Image.Image,
) -> None:
    x, y = corner
    size = (layout.width, layout.height)
    image = image.convert("RGB")
    sheet.paste(image if image.size == size else image.resize(size, Image.Resampling.LANCZOS), corner)
    draw.rectangle((x - 1, y - 1, x + layout.width, y + layout.height), outline=_EDGE)


def _draw_prompt(draw: ImageDraw.ImageDraw, layout: _Layout, row: int, prompt: str) -> None:
    font = ImageFont.load_default(layout.text_size)
    line_height = layout.text_size * _LINE
    width = layout.prompt_width - layout.gap
    lines = _wrapped(prompt, font, width)
    room = max(1, int(layout.height // line_height))
    if len(lines) > room:
        lines = [*lines[: room - 1], _shortened(lines[room - 1], font, width)]
    _, top = layout.corner(row, 0)
    y = top + (layout.height - len(lines) * line_height) / 2
    for line in lines:
        draw.text((layout.margin, y), line, _INK, font)
        y += line_height


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines no wider than `width`, broken between words, inside a word only where it alone is wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getbbox(longer)[2] <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getbbox(lines[-1] + letter)[2] > width and lines[-1]:
                lines.append("")
            lines[-1] += letter
    return lines


def _shortened(line: str, font: Font, width: int) -> str:
    while line and font.getbbox(f"{line}...")[2] > width:
        line = line[:-1]
    return f"{line.rstrip()}..."
