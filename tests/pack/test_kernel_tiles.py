"""The layouts of svdq's own kernels: every pack has its inverse, and elements stand where the kernels' comments say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svdq_cli.pack import kernel_tiles as tiles

E4M3 = torch.float8_e4m3fn
SIZES = [(64, 64), (128, 192), (192, 320)]


def numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(rows + columns)
    if dtype == torch.uint8:
        return torch.randint(0, 16, (rows, columns), generator=draw, dtype=dtype)
    return torch.rand(rows, columns, generator=draw).to(dtype)


PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], torch.dtype, int]] = {
    # columns of a matrix with K columns: K / divisor
    "weight codes": (tiles.pack_weight_codes, tiles.unpack_weight_codes, torch.uint8, 1),
    "row codes": (tiles.pack_row_codes, tiles.unpack_row_codes, torch.uint8, 1),
    "w4a16 codes": (tiles.pack_w4a16_weight, tiles.unpack_w4a16_weight, torch.uint8, 1),
    "column scales": (tiles.pack_column_scales, tiles.unpack_column_scales, torch.bfloat16, 64),
    "row scales": (tiles.pack_row_scales, tiles.unpack_row_scales, torch.float16, 64),
    "column micro scales": (tiles.pack_column_micro_scales, tiles.unpack_column_micro_scales, E4M3, 16),
    "row micro scales": (tiles.pack_row_micro_scales, tiles.unpack_row_micro_scales, E4M3, 16),
    "down": (tiles.pack_down_fragments, tiles.unpack_down_fragments, torch.bfloat16, 1),
    "up": (tiles.pack_up_fragments, tiles.unpack_up_fragments, torch.bfloat16, 4),
    "hidden": (tiles.pack_hidden_fragments, tiles.unpack_hidden_fragments, torch.float16, 4),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAIRS)
def test_unpacking_is_the_inverse_of_packing(name: str, size: tuple[int, int]):
    pack, unpack, dtype, divisor = PAIRS[name]
    matrix = numbers(size[0], size[1] // divisor, dtype)
    packed = pack(matrix)
    assert packed.is_contiguous()
    found = unpack(packed)
    assert found.shape == matrix.shape
    assert torch.equal(found.view(torch.uint8), matrix.view(torch.uint8))


def test_a_rank_of_zero_packs_to_nothing():
    assert tiles.pack_up_fragments(torch.zeros(128, 0)).shape == (0, 8, 32, 8)
    assert tiles.unpack_down_fragments(tiles.pack_down_fragments(torch.zeros(0, 128))).shape == (0, 128)


def nibble(words: Tensor, step: int, tile: int, lane: int, word: int, place: int) -> int:
    return int(words[step, tile, lane, word]) >> (4 * place) & 15


@pytest.mark.parametrize(("row", "column"), [(0, 0), (9, 33), (23, 71), (63, 127)])
def test_codes_stand_where_fragments_cuh_says(row: int, column: int):
    matrix = torch.zeros(64, 128, dtype=torch.uint8)
    matrix[row, column] = 9
    tile, step, half, t, j = row // 16, column // 64, column % 64 // 32, column % 32 // 8, column % 8
    upper, lane = row % 16 // 8, row % 8 * 4 + t
    assert nibble(tiles.pack_row_codes(matrix), step, tile, lane, 2 * half + upper, j) == 9
    assert nibble(tiles.pack_weight_codes(matrix), step, tile, lane, 2 * upper + half, j) == 9
    place = j // 2 + 4 * (j % 2)
    assert nibble(tiles.pack_w4a16_weight(matrix), step, tile, lane, 2 * upper + half, place) == 9


def test_a_lanes_scales_are_neighbors():
    rows = torch.arange(64.0, dtype=torch.float16)[:, None]
    lane_rows = tiles.pack_row_scales(rows)[0, :32].reshape(8, 4)
    assert lane_rows[3].tolist() == [3, 11, 19, 27]
    lane_columns = tiles.pack_column_scales(rows)[0].reshape(4, 8, 2)
    assert lane_columns[2].tolist() == [[8 * n + 4, 8 * n + 5] for n in range(8)]


def test_what_is_no_packed_code_is_refused():
    with pytest.raises(ValueError, match="must be int32"):
        tiles.unpack_weight_codes(torch.zeros(1, 1, 32, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must end in \(32, 4\)"):
        tiles.unpack_weight_codes(torch.zeros(1, 1, 16, 8, dtype=torch.int32))
    with pytest.raises(ValueError, match="multiple of 64"):
        tiles.pack_weight_codes(torch.zeros(16, 96, dtype=torch.uint8))
