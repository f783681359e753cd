"""4-bit weights with 16-bit activations, as the AWQ matrix-vector kernels of Nunchaku read them.

Four neighboring rows share a line of memory, and each 16-bit word holds four codes of one row that are 8
columns apart. Scales, zero points and bias stay in their natural order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svdq_cli.pack.tiles import Layout, require_shape

_BLOCK = 1 << 20  # codes at a time: what that takes stays in the cache
_LOW = 0x0F0F0F0F0F0F0F0F  # of eight bytes, the lower half of each


def pack_w4a16_codes(codes: Tensor) -> Tensor:
    """(N, K) integers 0..15 -> (N/4, K/2) int32. N % 4 == 0, K % 64 == 0. ValueError for other codes."""
    require_shape("codes", codes, (4, 64))
    least, most = (int(bound) for bound in codes.aminmax())
    if least < 0 or most > 15:
        raise ValueError(f"W4A16 codes must be in 0..15, but are in {least}..{most}")
    rows, columns = codes.shape
    words = torch.empty(rows, columns // 4, dtype=torch.int16, device=codes.device)
    for some in _row_blocks(rows, columns):
        words[some] = _joined(codes[some])
    lines = _lines(rows, columns).apply(words.view(torch.int64)).view(torch.int32)
    return lines.reshape(rows // 4, columns // 2)


def unpack_w4a16_codes(qweight: Tensor) -> Tensor:
    """(N/4, K/2) int32 -> (N, K) uint8 0..15. The inverse of `pack_w4a16_codes`."""
    require_shape("qweight", qweight, (1, 32))
    _require_int32(qweight)
    rows, columns = qweight.shape[0] * 4, qweight.shape[1] * 2
    words = _lines(rows, columns).undo(qweight.contiguous().view(torch.int64)).view(torch.int16)
    words = words.reshape(rows, columns // 4)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=qweight.device)
    for some in _row_blocks(rows, columns):
        codes[some] = _split(words[some])
    return codes


def pack_w4a16_scales(scales: Tensor) -> Tensor:
    """Scales or zero points, (N, G) -> (G, N), in natural order. G = K/64."""
    require_shape("scales", scales, (1, 1))
    return scales.T.contiguous()


def unpack_w4a16_scales(stored: Tensor) -> Tensor:
    """(G, N) -> (N, G). The inverse of `pack_w4a16_scales`."""
    require_shape("stored scales", stored, (1, 1))
    return stored.T.contiguous()


def interleave_adanorm(rows: Tensor, *, parts: int) -> Tensor:
    """(N, ...) -> (N, ...): row `parts * c + j` becomes row c of part j (shift, scale, gate, ...).

    Only runtimes that read all parts of a channel at once want this order. N % parts == 0.
    """
    _require_parts(rows, parts)
    return rows.unflatten(0, (parts, -1)).transpose(0, 1).flatten(0, 1)


def deinterleave_adanorm(rows: Tensor, *, parts: int) -> Tensor:
    """(N, ...) -> (N, ...). The inverse of `interleave_adanorm`."""
    _require_parts(rows, parts)
    return rows.unflatten(0, (-1, parts)).transpose(0, 1).flatten(0, 1)


def _joined(codes: Tensor) -> Tensor:
    """(N, K) in 0..15 -> (N, K/4) int16, words in natural order: of the 32 columns from c on, word w holds columns
    c + w, c + 8 + w, c + 16 + w and c + 24 + w, the first in the lowest bits."""
    rows, columns = codes.shape
    runs = codes.to(torch.uint8).contiguous().view(torch.int64).reshape(rows, columns // 32, 2, 2)
    pairs = (runs[..., 1] << 4).bitwise_or_(runs[..., 0]).view(torch.uint8)  # (N, K/32, 2 x 8)
    low, high = pairs[..., :8].to(torch.int16), pairs[..., 8:].to(torch.int16)
    return (high << 8).bitwise_or_(low).reshape(rows, columns // 4)


def _split(words: Tensor) -> Tensor:
    """The inverse of `_joined`."""
    rows, columns = words.shape[0], 4 * words.shape[1]
    words = words.reshape(rows, columns // 32, 8)
    pairs = torch.stack((words & 0xFF, (words >> 8) & 0xFF), dim=-2).to(torch.uint8).view(torch.int64)
    runs = torch.stack((pairs & _LOW, (pairs >> 4) & _LOW), dim=-1)  # (N, K/32, 2, 1, 2)
    return runs.view(torch.uint8).reshape(rows, columns)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _require_int32(qweight: Tensor) -> None:
    """ValueError unless `qweight` is int32."""
    if qweight.dtype != torch.int32:
        raise ValueError(f"qweight of a W4A16 layer must be int32, but is {qweight.dtype}")


def _require_parts(rows: Tensor, parts: int) -> None:
    if parts < 1 or rows.shape[0] % parts:
        raise ValueError(f"{rows.shape[0]} rows do not divide into {parts} parts")


def _lines(rows: int, columns: int) -> Layout:
    """Four words in natural order as one number."""
    # n = 4 line + row; k = 64 block + 32 half + 8 nibble + word, of which 16 words of 4 nibbles stay together
    return Layout(split=(rows // 4, 4, columns // 64, 4), order=(0, 2, 1, 3))
