"""comfy-kitchen's tile-packed layout: tiles of 128 rows by 64 columns, four rows' 32-byte slices after one another.

Bytes hold two neighboring columns, the even one in the low half, so permuting bytes permutes codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.pack.row_major import pack_rows, unpack_rows
from svdq_cli.pack.tiles import Layout, require_shape
from svdq_cli.records import Int4

ROWS, COLUMNS = 128, 64  # of one tile


def pack_kitchen_codes(codes: Tensor) -> Tensor:
    """int4 codes (N, K) -> (N/128, K/64, 32, 128) int8. N % 128 == 0, K % 64 == 0."""
    require_shape("codes", codes, (ROWS, COLUMNS))
    rows, columns = codes.shape
    return (
        _layout(rows, columns)
        .apply(pack_rows(codes, Int4()))
        .reshape(rows // ROWS, columns // COLUMNS, 32, 128)
    )


def unpack_kitchen_codes(stored: Tensor) -> Tensor:
    """(N/128, K/64, 32, 128) int8 -> (N, K) int8 in -8..7. The inverse of `pack_kitchen_codes`."""
    require_shape("stored codes", stored, (1, 1, 32, 128))
    rows, columns = stored.shape[0] * ROWS, stored.shape[1] * COLUMNS
    return unpack_rows(_layout(rows, columns).undo(stored).reshape(rows, columns // 2), Int4())


def pack_kitchen_rows(matrix: Tensor) -> Tensor:
    """Scales (N, G) or `up` (N, R) -> (N/128, G or R, 128). N % 128 == 0."""
    require_shape("matrix", matrix, (ROWS, 1))
    return matrix.reshape(-1, ROWS, matrix.shape[1]).transpose(1, 2).contiguous()


def unpack_kitchen_rows(stored: Tensor) -> Tensor:
    """(N/128, G or R, 128) -> (N, G or R). The inverse of `pack_kitchen_rows`."""
    require_shape("stored matrix", stored, (1, 1, ROWS))
    rows = stored.transpose(1, 2).reshape(-1, stored.shape[1])
    return rows.clone(memory_format=torch.contiguous_format)  # also where one column leaves strides undefined


def _layout(rows: int, columns: int) -> Layout:
    # n = 128 tile + 4 quad + row; byte column = 32 group + byte
    return Layout(split=(rows // ROWS, 32, 4, columns // COLUMNS, 32), order=(0, 3, 1, 2, 4))


def text_bytes(text: str) -> Tensor:
    """A text as the (bytes,) uint8 tensor that ComfyUI reads layer metadata from."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def bytes_text(stored: Tensor) -> str:
    """The inverse of `text_bytes`. UnicodeDecodeError, a ValueError, for bytes that are not text. (bytes,) uint8."""
    return stored.contiguous().view(torch.uint8).numpy().tobytes().decode()
