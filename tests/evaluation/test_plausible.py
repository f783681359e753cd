"""Images that show nothing are seen before their figures are believed."""

from __future__ import annotations

import numpy as np
from PIL import Image

from svdq_cli.evaluation.plausible import look_at

SIDE = 96


def plain(color: tuple[int, int, int], spread: float, seed: int = 0) -> Image.Image:
    """One color with noise of that standard deviation."""
    numbers = np.random.default_rng(seed).normal(color, spread, (SIDE, SIDE, 3))
    return Image.fromarray(numbers.clip(0, 255).astype(np.uint8))


def with_object(size: int, seed: int) -> Image.Image:
    """A square on a plain background, somewhere."""
    image = plain((240, 240, 240), 3, seed)
    x, y = np.random.default_rng(seed).integers(0, SIDE - size, 2)
    image.paste((200, 30, 20), (x, y, x + size, y + size))
    return image


def test_near_white_images_are_seen_as_empty():
    """As they came out of a small model that was asked for a photograph: mean 242.6, standard deviation 8.6 to 9."""
    found = look_at(plain((243, 243, 243), 9, seed) for seed in range(4))
    assert (found.nearly_uniform, found.black, found.meaningless) == (4, 0, True)
    assert found.sentences("16-bit") == ("4 of 4 16-bit images are nearly one color",)


def test_a_small_object_on_a_plain_background_is_an_image():
    found = look_at(with_object(14, seed) for seed in range(6))
    assert (found.nearly_uniform, found.meaningless) == (0, False)


def test_black_images_are_told_from_other_plain_ones():
    found = look_at([plain((0, 0, 0), 0), with_object(40, 1), with_object(30, 2)])
    assert (found.black, found.nearly_uniform, found.meaningless) == (1, 0, False)
    assert "not finite" in found.sentences("4-bit")[0]


def test_images_of_different_prompts_that_are_all_alike_mean_nothing():
    same = [with_object(40, 1)] * 3
    assert look_at(same).alike
    assert look_at(same).meaningless
    assert not look_at(same, different_prompts=False).alike
    assert not look_at([with_object(40, seed) for seed in range(3)]).alike


def test_the_images_of_a_run_need_not_be_in_memory_together():
    def one_by_one():
        for seed in range(3):
            yield with_object(40, seed)

    assert look_at(one_by_one()).images == 3
