"""The layouts of Hopper's own kernels: inverses, and single numbers where hopper_tiles.cuh says they stand."""

from __future__ import annotations

import pytest
import torch

from svdq_cli.experimental.hopper import operations as hopper
from svdq_cli.experimental.hopper.linear import HopperW4A4Linear, hopper_linear
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.experimental.hopper.tiles import (
    pack_feature_scales,
    pack_rows,
    pack_signed_codes,
    pack_token_scales,
    unpack_feature_scales,
    unpack_rows,
    unpack_signed_codes,
    unpack_token_scales,
)
from svdq_cli.records import Int4
from tests.runtime.test_fused import random_w4a4

TILES = (128, 192)


def numbered(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns).reshape(rows, columns)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("dtype", "columns"), [(torch.uint8, 64), (torch.uint8, 320), (torch.bfloat16, 32)])
def test_unpacking_rows_gives_them_back(tile: int, dtype: torch.dtype, columns: int):
    rows = numbered(2 * tile, columns).remainder(251).to(dtype)
    stored = pack_rows(rows, tile=tile)
    assert torch.equal(unpack_rows(stored), rows)
    each = stored.shape[-1]
    row, column = tile + 9, columns - 3
    step, inside = divmod(column, 4 * each)
    assert stored[1, step, inside // each, 9, inside % each] == rows[row, column]


def test_rows_without_columns_stay_without():
    stored = pack_rows(torch.empty(256, 0, dtype=torch.bfloat16), tile=128)
    assert stored.shape == (2, 0, 4, 128, 8)
    assert unpack_rows(stored).shape == (256, 0)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("groups", [1, 5])
def test_unpacking_token_scales_gives_them_back(tile: int, groups: int):
    scales = numbered(2 * tile, groups).float()
    assert torch.equal(unpack_token_scales(pack_token_scales(scales, tile=tile)), scales)


def test_a_lanes_four_tokens_have_neighboring_scales():
    stored = pack_token_scales(torch.arange(128.0)[:, None], tile=128)[0, 0]
    for pair in range(8):
        for t in range(4):
            first = 16 * pair + 2 * t
            four = stored[16 * pair + 4 * t : 16 * pair + 4 * t + 4]
            assert four.tolist() == [first, first + 1, first + 8, first + 9]


def test_unpacking_feature_scales_gives_them_back():
    scales = numbered(256, 3).bfloat16()
    stored = pack_feature_scales(scales, tile=128)
    assert stored[1, 2, 5] == scales[128 + 5, 2]
    assert torch.equal(unpack_feature_scales(stored), scales)


def test_unpacking_signed_codes_gives_them_back():
    codes = torch.randint(-8, 8, (256, 192), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    assert torch.equal(unpack_signed_codes(pack_signed_codes(codes, tile=128)), codes)


def test_masks_a_rotation_and_a_carry_make_fp8_numbers_of_a_word():
    """Word i of lane (g, t): the columns 16 i + 4 t .. + 3 of rows g and, rotated by four bits, g + 8."""
    codes = torch.randint(-8, 8, (128, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    words = pack_signed_codes(codes, tile=128)
    for sixteen, g, t, i in ((0, 0, 0, 0), (3, 5, 2, 1), (7, 7, 3, 3)):
        word = int(words[0, 0, sixteen, 4 * g + t, i]) & 0xFFFFFFFF
        rotated = (word >> 4 | word << 28) & 0xFFFFFFFF
        for r, bits in enumerate((word, rotated)):
            held = torch.tensor(
                [(bits & 0x87878787) >> 8 * byte & 0xFF for byte in range(4)], dtype=torch.uint8
            )
            row, column = 16 * sixteen + 8 * r + g, 16 * i + 4 * t
            held += held >> 7  # a negative code's magnitude is stored less 1
            values = held.view(torch.float8_e4m3fn).float() * 512
            assert torch.equal(values, codes[row, column : column + 4].float())


@pytest.mark.parametrize("code", [-9, 8])
def test_a_code_outside_four_bits_is_refused(code: int):
    codes = torch.zeros(128, 64, dtype=torch.int8)
    codes[3, 5] = code
    with pytest.raises(ValueError, match=r"-8\.\.7"):
        pack_signed_codes(codes, tile=128)


@pytest.mark.parametrize(
    ("m", "n", "mode", "tile"),
    [
        # 576 tiles of 192 tokens are 5 waves of 132 blocks, the last of them less than half full; 864 of 128 are 7
        (4608, 3072, HopperMode.FP8, hopper.SMALL_TOKENS),
        (4608, 3072, HopperMode.W4A8, hopper.SMALL_TOKENS),
        (4608, 3072, HopperMode.EXACT, hopper.TOKENS),  # whose small tile issues more instructions a token
        (4608, 9216, HopperMode.FP8, hopper.SMALL_TOKENS),
        (4608, 9216, HopperMode.EXACT, hopper.TOKENS),
        (4096, 3072, HopperMode.FP8, hopper.TOKENS),
        (1, 3072, HopperMode.EXACT, hopper.SMALL_TOKENS),
    ],
)
def test_a_tile_is_chosen_by_the_waves_of_blocks(m: int, n: int, mode: HopperMode, tile: int):
    assert hopper.token_tile(m, n, mode) == tile
    assert hopper.padded_tokens(m, n, mode) % tile == 0


def test_layers_of_other_widths_share_an_input_that_is_quantized_once():
    one, two = (hopper_linear(random_w4a4(Int4(), n=n, k=128), HopperMode.EXACT) for n in (128, 256))
    assert isinstance(one, HopperW4A4Linear)
    assert isinstance(two, HopperW4A4Linear)
    other = two.quantizer._like(one.quantizer.down, 1)
    other.smoothing = one.quantizer.smoothing
    assert other.options != one.quantizer.options
    assert one.quantizer.equals(other)
    x = torch.randn(4608, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert two(x).shape == (4608, 256)
