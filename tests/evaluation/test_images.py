"""PSNR and SSIM of pictures, with values that can be worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from svdq_cli.errors import InputError
from svdq_cli.evaluation.images import PSNR_CAP_DB, compare, psnr_db, ssim, summarize


def gray(level: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def noisy(image: Image.Image, amount: float) -> Image.Image:
    return Image.blend(image, Image.effect_noise(image.size, 100).convert("RGB"), amount)


def gradient(size: int = 96) -> Image.Image:
    return Image.linear_gradient("L").resize((size, size)).convert("RGB")


def test_a_shift_of_ten_levels_is_28_db():
    assert psnr_db(gray(100), gray(110)) == pytest.approx(20 * math.log10(255 / 10))


def test_an_error_in_one_channel_counts_a_third():
    red = Image.new("RGB", (96, 96), (110, 100, 100))
    assert psnr_db(gray(100), red) == pytest.approx(10 * math.log10(255**2 / (100 / 3)))


def test_differences_do_not_wrap_around_at_8_bits():
    assert psnr_db(gray(0), gray(255)) == pytest.approx(0.0)


def test_identical_images_stop_at_the_cap_and_stay_valid_json():
    assert psnr_db(gradient(), gradient()) == PSNR_CAP_DB
    assert json.loads(json.dumps(psnr_db(gradient(), gradient()), allow_nan=False)) == 100.0


def test_the_smallest_difference_of_a_small_image_is_below_the_cap():
    other = gradient()
    r, g, b = other.getpixel((5, 5))  # type: ignore[misc]
    other.putpixel((5, 5), (r + 1, g, b))
    assert 90 < psnr_db(gradient(), other) < PSNR_CAP_DB


def test_ssim_is_one_for_equal_images_and_falls_with_noise():
    slight, strong = noisy(gradient(), 0.05), noisy(gradient(), 0.5)
    assert ssim(gradient(), gradient()) == pytest.approx(1.0, abs=1e-9)
    assert 1 > ssim(gradient(), slight) > ssim(gradient(), strong) > -1


def test_ssim_of_flat_images_is_the_luminance_term():
    # Without any structure only (2ab + c1) / (a^2 + b^2 + c1) is left, c1 = 0.01^2.
    a, b, c1 = 100 / 255, 150 / 255, 1e-4
    assert ssim(gray(100), gray(150)) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


@pytest.mark.parametrize("size", [(11, 11), (96, 96), (64, 128)])
def test_ssim_takes_small_and_oblong_images(size):
    assert ssim(gray(90, size), gray(90, size)) == pytest.approx(1.0, abs=1e-9)


def test_ssim_refuses_an_image_smaller_than_its_window():
    with pytest.raises(InputError, match="8 x 40"):
        ssim(gray(0, (8, 40)), gray(0, (8, 40)))


def test_images_of_different_sizes_are_refused():
    with pytest.raises(InputError, match="96 x 96 and 96 x 64"):
        psnr_db(gray(0), gray(0, (96, 64)))


def test_sets_of_different_length_and_empty_sets_are_refused():
    with pytest.raises(InputError, match="2 reference images, but 1"):
        compare([gray(0), gray(1)], [gray(0)])
    with pytest.raises(InputError):
        compare([], [])


def test_compare_summarizes_over_images():
    scores = compare([gray(100), gray(100)], [gray(110), gray(120)])
    ten, twenty = 20 * math.log10(25.5), 20 * math.log10(12.75)
    assert scores.psnr.mean == pytest.approx((ten + twenty) / 2)
    assert scores.psnr.std == pytest.approx((ten - twenty) / 2)
    assert scores.psnr.min == pytest.approx(twenty)
    assert scores.ssim.min <= scores.ssim.mean <= 1


def test_one_figure_has_no_spread():
    summary = summarize([21.5])
    assert (summary.mean, summary.std, summary.min, summary.max) == (21.5, 0.0, 21.5, 21.5)
    assert summary.ci95 is None


def test_the_interval_of_the_mean_covers_it_about_as_often_as_it_says():
    draw = torch.Generator().manual_seed(0)
    means = [summarize((30 + 5 * torch.randn(40, generator=draw)).tolist()).ci95 for _ in range(100)]
    covered = sum(low <= 30 <= high for low, high in (interval for interval in means if interval))
    assert 88 <= covered <= 99  # 95 less a little: the percentile bootstrap is narrow for few pictures


def test_equal_figures_have_equal_intervals_and_more_images_narrower_ones():
    few = summarize([20.0, 24.0, 28.0, 32.0])
    assert few == summarize([20.0, 24.0, 28.0, 32.0])
    many = summarize([20.0, 24.0, 28.0, 32.0] * 16)
    assert few.ci95 is not None
    assert many.ci95 is not None
    assert few.min < few.ci95[0] < many.ci95[0] < 26 < many.ci95[1] < few.ci95[1] < few.max


def test_scoring_leaves_the_images_untouched_and_reads_any_mode():
    palette = gradient().convert("P")
    assert psnr_db(palette, palette.convert("RGB")) == PSNR_CAP_DB
    assert palette.mode == "P"
