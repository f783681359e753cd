"""The contact sheet: what stands where."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops

from svdq_cli.evaluation.grid import image_grid

RED, BLUE = (200, 30, 30), (30, 30, 200)
PROMPTS = ["a small red circle on yellow", "a large blue square left of a small green triangle on white"]


def flat(color: tuple[int, int, int], size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size, color)


def columns(*titles: str):
    return [(title, [flat(RED), flat(BLUE)]) for title in titles]


def ink_box(sheet: Image.Image) -> tuple[int, int, int, int]:
    """The smallest box that holds everything that is not paper."""
    paper = Image.new("RGB", sheet.size, sheet.getpixel((0, 0)))  # type: ignore[arg-type]
    box = ImageChops.difference(sheet, paper).getbbox()
    assert box is not None
    return box


def pixels(sheet: Image.Image) -> list[tuple[int, ...]]:
    values = sheet.tobytes()
    return list(zip(values[::3], values[1::3], values[2::3], strict=True))


def count(sheet: Image.Image, color: tuple[int, int, int]) -> int:
    return pixels(sheet).count(color)


@pytest.mark.parametrize("scale", [1, 2])
def test_every_image_appears_whole_at_its_scale(scale):
    sheet = image_grid(columns("16-bit", "naive int4", "SVDQuant"), PROMPTS, scale=scale)
    for color in (RED, BLUE):
        assert count(sheet, color) == 3 * (96 * scale) ** 2


def test_rows_are_prompts_and_columns_are_ways():
    sheet = image_grid([("a", [flat(RED), flat(RED)]), ("b", [flat(BLUE), flat(BLUE)])], PROMPTS, scale=1)
    reds = [i for i, pixel in enumerate(pixels(sheet)) if pixel == RED]
    blues = [i for i, pixel in enumerate(pixels(sheet)) if pixel == BLUE]
    assert max(i % sheet.width for i in reds) < min(i % sheet.width for i in blues)
    assert min(reds) // sheet.width == min(blues) // sheet.width


@pytest.mark.parametrize("size", [(96, 96), (96, 64), (256, 256)])
@pytest.mark.parametrize(
    "title", ["16-bit", "SVDQuant int4\n22.1 dB", "a title far too long for its small picture"]
)
def test_nothing_touches_the_edge(size, title):
    images = [flat(RED, size), flat(BLUE, size)]
    sheet = image_grid([(title, images), ("16-bit", images)], PROMPTS, scale=1)
    left, top, right, bottom = ink_box(sheet)
    assert left >= 8
    assert top >= 8
    assert right <= sheet.width - 8
    assert bottom <= sheet.height - 8


def test_a_prompt_without_end_stays_beside_its_image():
    usual = image_grid(columns("16-bit"), PROMPTS)
    endless = image_grid(columns("16-bit"), ["word " * 500, "x" * 2000])
    assert endless.size == usual.size
    for color in (RED, BLUE):
        assert count(endless, color) == count(usual, color)  # no text over a picture


def test_the_second_line_of_a_title_makes_room_for_itself():
    assert image_grid(columns("a\n22.1 dB"), PROMPTS).height > image_grid(columns("a"), PROMPTS).height


def test_equal_input_gives_equal_bytes():
    first, second = (image_grid(columns("16-bit", "int4"), PROMPTS) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_a_column_short_of_an_image_is_refused():
    with pytest.raises(ValueError, match="'int4' has 1 images for 2 prompts"):
        image_grid([("int4", [flat(RED)])], PROMPTS)


def test_images_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="different sizes"):
        image_grid([("int4", [flat(RED), flat(RED, (64, 64))])], PROMPTS)


def test_an_empty_sheet_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        image_grid([], [])
