"""Each layout and its inverse, over shapes from one tile up, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from svdq_cli.pack.codes import pack_codes, unpack_codes
from svdq_cli.pack.low_rank import pack_down, pack_up, unpack_down, unpack_up
from svdq_cli.pack.padding import crop, pad
from svdq_cli.pack.scales import (
    pack_micro_scales,
    pack_scales,
    pack_vector,
    unpack_micro_scales,
    unpack_scales,
    unpack_vector,
)
from svdq_cli.pack.w4a16 import (
    deinterleave_adanorm,
    interleave_adanorm,
    pack_w4a16_codes,
    pack_w4a16_scales,
    unpack_w4a16_codes,
    unpack_w4a16_scales,
)
from svdq_cli.records import Int4, NvFp4


def numbered(*shape: int) -> torch.Tensor:
    """A 16-bit tensor whose elements are all different, so that every misplaced one shows."""
    count = torch.Size(shape).numel()
    assert count <= 2**15
    return torch.arange(count, dtype=torch.int16).reshape(shape)


@pytest.mark.parametrize("shape", [(128, 64), (128, 128), (256, 64), (384, 192), (128, 1088)])
@pytest.mark.parametrize("precision", [Int4(), NvFp4()])
def test_codes_come_back(shape: tuple[int, int], precision: Int4 | NvFp4) -> None:
    low, high = (-8, 8) if isinstance(precision, Int4) else (0, 16)
    codes = torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, precision)
    assert (packed.dtype, packed.shape) == (torch.int8, (shape[0], shape[1] // 2))
    assert torch.equal(unpack_codes(packed, precision), codes)


@pytest.mark.parametrize("groups", [1, 2, 3, 17])
@pytest.mark.parametrize("rows", [128, 384])
def test_scales_come_back(rows: int, groups: int) -> None:
    scales = numbered(rows, groups)
    assert pack_scales(scales).shape == (groups, rows)
    assert torch.equal(unpack_scales(pack_scales(scales)), scales)


@pytest.mark.parametrize("groups", [4, 8, 68])
@pytest.mark.parametrize("rows", [128, 384])
def test_micro_scales_come_back(rows: int, groups: int) -> None:
    raw = torch.randint(
        0, 0x7F, (rows, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    scales = raw.view(torch.float8_e4m3fn)
    packed = pack_micro_scales(scales)
    assert (packed.dtype, packed.shape) == (torch.float8_e4m3fn, (groups, rows))
    assert torch.equal(unpack_micro_scales(packed).view(torch.uint8), raw)


def test_a_vector_is_stored_in_the_documented_order() -> None:
    stored = pack_vector(numbered(256))
    assert stored[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert stored[240:].tolist() == [240 + i for i in [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]]
    assert torch.equal(unpack_vector(stored), numbered(256))


@pytest.mark.parametrize("rank", [16, 48])
@pytest.mark.parametrize("features", [16, 144, 256])
def test_low_rank_factors_come_back(rank: int, features: int) -> None:
    down, up = numbered(rank, features), numbered(features, rank)
    assert pack_down(down).shape == (features, rank)
    assert torch.equal(unpack_down(pack_down(down)), down)
    assert pack_up(up).shape == (features, rank)
    assert torch.equal(unpack_up(pack_up(up)), up)


def test_low_rank_tiles_of_one_column_strip_lie_together() -> None:
    """The kernel walks K in the outer loop: the first 16 columns of all ranks come first."""
    stored = pack_down(numbered(32, 64)).flatten()
    columns = stored[: 32 * 16] % 64
    assert sorted(set(columns.tolist())) == list(range(16))


@pytest.mark.parametrize("shape", [(4, 64), (12, 192), (8, 1088)])
def test_w4a16_codes_come_back(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_w4a16_codes(codes)
    assert (packed.dtype, packed.shape) == (torch.int32, (shape[0] // 4, shape[1] // 2))
    assert torch.equal(unpack_w4a16_codes(packed), codes)


def test_w4a16_scales_are_transposed_and_come_back() -> None:
    scales = numbered(12, 3)
    stored = pack_w4a16_scales(scales)
    assert stored.is_contiguous()
    assert stored[2, 7] == scales[7, 2]
    assert torch.equal(unpack_w4a16_scales(stored), scales)


@pytest.mark.parametrize("parts", [1, 3, 6])
def test_adanorm_rows_interleave_and_come_back(parts: int) -> None:
    rows = numbered(30, 2)
    mixed = interleave_adanorm(rows, parts=parts)
    channels = 30 // parts
    assert torch.equal(mixed[parts * 4 + parts - 1], rows[(parts - 1) * channels + 4])
    assert torch.equal(deinterleave_adanorm(mixed, parts=parts), rows)


@pytest.mark.parametrize("shape", [(1, 17), (128, 128), (129, 17)])
def test_padding_keeps_the_corner_and_fills_the_rest(shape: tuple[int, int]) -> None:
    plain = numbered(*shape)
    grown = pad(plain, multiples=(128, 16), fill=-1)
    assert grown.shape[0] % 128 == 0
    assert grown.shape[1] % 16 == 0
    assert torch.equal(crop(grown, shape=shape), plain)
    assert int((grown == -1).sum()) == grown.numel() - plain.numel()


def test_packing_accepts_a_view_that_is_not_contiguous() -> None:
    scales = numbered(3, 128).T
    assert torch.equal(unpack_scales(pack_scales(scales)), scales)
    raw = torch.arange(4 * 128).remainder(127).to(torch.uint8).reshape(4, 128).T
    micro = pack_micro_scales(raw.view(torch.float8_e4m3fn))
    assert torch.equal(unpack_micro_scales(micro).view(torch.uint8), raw)


def test_codes_out_of_range_are_refused() -> None:
    codes = torch.zeros(128, 64, dtype=torch.int8)
    codes[5, 5] = 8
    with pytest.raises(ValueError, match=r"int4 codes must be in -8\.\.7, but are in 0\.\.8"):
        pack_codes(codes, Int4())
    pack_codes(codes, NvFp4())
    with pytest.raises(ValueError, match=r"nvfp4 codes must be in 0\.\.15"):
        pack_codes(-codes, NvFp4())
    with pytest.raises(ValueError, match=r"W4A16 codes must be in 0\.\.15"):
        pack_w4a16_codes(-codes)


def test_sizes_off_the_tile_are_refused_by_axis() -> None:
    with pytest.raises(ValueError, match="codes: axis 0 must be a positive multiple of 128, but is 129"):
        pack_codes(torch.zeros(129, 64, dtype=torch.int8), Int4())
    with pytest.raises(ValueError, match="micro scales: axis 1 must be a positive multiple of 4"):
        pack_micro_scales(torch.zeros(128, 3).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="down: axis 0 must be a positive multiple of 16, but is 0"):
        pack_down(torch.zeros(0, 128, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="vector needs 1 axes"):
        pack_vector(torch.zeros(128, 1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="do not divide into 7 parts"):
        interleave_adanorm(torch.zeros(24), parts=7)


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="scales needs a dtype of 2 bytes"):
        pack_scales(torch.ones(128, 2))
    with pytest.raises(ValueError, match="must be int32"):
        unpack_w4a16_codes(torch.zeros(4, 32, dtype=torch.int64))
