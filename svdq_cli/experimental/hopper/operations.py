"""Hopper's own int4 kernels (kernels/experimental/hopper/) as functions on torch tensors, next to those of
`runtime.ops`.

Layouts: `experimental.hopper.tiles`. The size of a tile of tokens travels in the shapes of what `quantize_down`
returns.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.gpu import variants
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launcher import Launcher, aligned, splits_of
from svdq_cli.pack.kernel_tiles import STEP
from svdq_cli.pack.padding import ceil_div, round_up
from svdq_cli.runtime.ops.records import InputOperands, Quantized

FEATURES = 128  # rows of a weight's tile
TOKENS, SMALL_TOKENS = 192, 128  # of an activation's
BLOCKS = 132  # that run at once: multiprocessors of an H100 or H200 with SXM
# Of a stage of the large and the small tile, by counting (`make kernel-report`): instructions issued or tensor cores
STAGE_CYCLES = {HopperMode.EXACT: (552, 416), HopperMode.W4A8: (384, 270), HopperMode.FP8: (384, 256)}
MOST_PADDING = 1 / 20  # above which the smaller tile is taken, if it pads less
PIECES, PIECE_BYTES = 4, 16  # of a row in a tile
RANK_STEP = 32
THREADS = 384  # a producer warpgroup and two consumers
STAGE_GROUPS = 2
SHARED_BYTES = 227 * 1024  # of a multiprocessor, for one block
REDUCE_WARPS = 8


class HopperProduct(NamedTuple):
    """What a product reads of its layer. Shapes: `experimental.hopper.tiles`, with N padded to 128 and R to 32."""

    weight: Tensor
    weight_scales: Tensor
    up: Tensor
    bias: Tensor | None  # (NP,) 16-bit


# ------------------------------------------------------------------------------------------ tiles and variants


def token_tile(m: int, n: int = 0, mode: HopperMode = HopperMode.EXACT) -> int:
    """Tokens in a tile, for M of them. Blocks take the tiles of a result of N features in waves, and the last wave may
    leave most of them idle: the tile whose waves take less time, the large one where both take the same. Where N is not
    known (0) the large one, unless it pads much more."""
    if n:
        large, small = (
            cycles * -(-(-(-m // size) * -(-n // FEATURES)) // BLOCKS)
            for size, cycles in zip((TOKENS, SMALL_TOKENS), STAGE_CYCLES[mode], strict=True)
        )
        return SMALL_TOKENS if small < large else TOKENS
    large, small = (round_up(m, size) for size in (TOKENS, SMALL_TOKENS))
    return SMALL_TOKENS if large - small > MOST_PADDING * m else TOKENS


def padded_tokens(m: int, n: int = 0, mode: HopperMode = HopperMode.EXACT) -> int:
    return round_up(m, token_tile(m, n, mode))


def stage_bytes(mode: HopperMode, tokens: int) -> int:
    """One stage of the ring (hopper_pipeline.cuh): two groups of codes on both sides, and their scales."""
    match mode:
        case HopperMode.EXACT:
            group = tokens * (STEP + 4) + FEATURES * (STEP // 2 + 2)
        case HopperMode.W4A8:
            group = tokens * STEP + FEATURES * (STEP // 2 + 2)
        case HopperMode.FP8:
            group = (tokens + FEATURES) * STEP
    return STAGE_GROUPS * group


def dynamic_shared(mode: HopperMode, tokens: int, stages: int) -> int:
    """Stages, the two warpgroups' staging of a result, barriers (hopper_block.cuh)."""
    staging, barriers = 2 * tokens * (64 * 2 + 16), round_up(2 * stages * 8, 128)
    return stages * stage_bytes(mode, tokens) + staging + barriers


def stages_that_fit(mode: HopperMode, tokens: int) -> int:
    stages = 2
    while dynamic_shared(mode, tokens, stages + 1) <= SHARED_BYTES:
        stages += 1
    return stages


def _constants(dtype: torch.dtype, mode: HopperMode, tokens: int) -> dict[str, int]:
    return {"ELEMENT_BF16": dtype == torch.bfloat16, "PRECISION_NVFP4": 0, "MODE": mode, "TOKENS": tokens}


def _variant(kernel: str, constants: dict[str, int], **more: int) -> Variant:
    return Variant(kernel, tuple((name, int(value)) for name, value in {**constants, **more}.items()))


def _block(mode: HopperMode, tokens: int) -> dict[str, int]:
    stages = stages_that_fit(mode, tokens)
    return {"STAGES": stages, "DYNAMIC_SHARED": dynamic_shared(mode, tokens, stages)}


@functools.cache
def quantize_down_variant(
    dtype: torch.dtype, mode: HopperMode, *, tokens: int, rank: int, unsigned: bool = False
) -> Variant:
    chunk = variants.rank_chunk(rank)
    # Two blocks share a multiprocessor when a thread has 128 registers; float16 in mode EXACT would spill
    together = chunk <= 32 and not (dtype == torch.float16 and mode == HopperMode.EXACT)
    return _variant(
        "hopper_quantize_down",
        _constants(dtype, mode, tokens),
        QUANTIZED_UNSIGNED=unsigned,
        RANK_CHUNK=chunk,
        WARPS=variants.QUANTIZE_WARPS,
        MIN_BLOCKS=2 if together else 1,
    )


@functools.cache
def reduce_hidden_variant(dtype: torch.dtype, *, tokens: int) -> Variant:
    return _variant("hopper_reduce_hidden", _constants(dtype, HopperMode.EXACT, tokens), WARPS=REDUCE_WARPS)


@functools.cache
def gemm_variant(dtype: torch.dtype, mode: HopperMode, *, tokens: int) -> Variant:
    return _variant("hopper_gemm", _constants(dtype, mode, tokens), **_block(mode, tokens))


@functools.cache
def gelu_quantize_variant(dtype: torch.dtype, *, tokens: int, next_unsigned: bool = False) -> Variant:
    mode = HopperMode.EXACT
    return _variant(
        "hopper_gelu_quantize",
        _constants(dtype, mode, tokens),
        **_block(mode, tokens),
        QUANTIZED_UNSIGNED=next_unsigned,
    )


# ------------------------------------------------------------------------------------------ operations


def quantize_down(
    launcher: Launcher,
    x: Tensor,
    inverse_smooth: Tensor,
    down: Tensor,
    *,
    mode: HopperMode,
    unsigned: bool = False,
    shift: float = 0.0,
    n: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hopper_quantize_down.cu. `x` (M, K) contiguous, `down` of a rank that is a multiple of 32. `unsigned` in
    mode EXACT only. `n`: features of the layer that reads it, 0 where not known. Returns packed codes, token scales and
    hidden."""
    (m, k), rank = x.shape, 8 * down.shape[1]
    tokens, mp = token_tile(m, n, mode), padded_tokens(m, n, mode)
    codes, scales, hidden = new_quantized(x, mp, k, rank, mode=mode, tokens=tokens)
    if m == 0:
        return codes, scales, hidden
    chunk = variants.rank_chunk(rank)
    chunks = ceil_div(rank, chunk) if rank else 1
    blocks = mp // variants.QUANTIZE_ROWS
    splits = splits_of(launcher, blocks * chunks, k) if rank and mode == HopperMode.EXACT else 1
    partial = x.new_empty(splits, mp, rank, dtype=torch.float32) if splits > 1 else None
    launcher.launch(
        quantize_down_variant(x.dtype, mode, tokens=tokens, rank=rank, unsigned=unsigned),
        (blocks, chunks, splits),
        variants.QUANTIZE_WARPS * variants.LANES,
        *(aligned(x), inverse_smooth, down, codes, scales, hidden, partial, shift, m, mp, k, rank),
    )
    if partial is not None:
        reduce_hidden(launcher, partial, hidden)
    return codes, scales, hidden


def reduce_hidden(launcher: Launcher, partial: Tensor, hidden: Tensor) -> None:
    """hopper_reduce_hidden.cu. `partial` (splits, MP, R) float32; fills `hidden`."""
    splits, mp, rank = partial.shape
    threads = REDUCE_WARPS * variants.LANES
    launcher.launch(
        reduce_hidden_variant(hidden.dtype, tokens=hidden.shape[3]),
        (ceil_div(mp * (rank // 8), threads), 1, 1),
        threads,
        *(partial, hidden, splits, mp, rank),
    )


def gemm(
    launcher: Launcher,
    quantized: Quantized,
    product: HopperProduct,
    *,
    m: int,
    n: int,
    mode: HopperMode,
) -> Tensor:
    """hopper_gemm.cu. Returns y (M, N) in the dtype of `up`."""
    up = product.up
    y = up.new_empty(m, n)
    if m == 0:
        return y
    token_tiles, groups, _, tokens, _ = quantized[0].shape
    feature_tiles, rank_steps = up.shape[:2]
    launcher.launch(
        gemm_variant(up.dtype, mode, tokens=tokens),
        (min(launcher.multiprocessors, token_tiles * feature_tiles), 1, 1),
        THREADS,
        *(*quantized, *product, y),
        *(token_tiles, feature_tiles, groups, rank_steps, m, n),
    )
    return y


def gelu_quantize(
    launcher: Launcher,
    quantized: Quantized,
    product: HopperProduct,
    following: InputOperands,
    *,
    m: int,
    next_unsigned: bool = False,
    shift: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hopper_gelu_quantize.cu, both layers in mode EXACT. Returns the next layer's codes, scales and hidden. Packed
    from (M, K) codes, (M, K/64) scales and (M, R), as `experimental.hopper.tiles` says."""
    up = product.up
    token_tiles, groups, _, tokens, _ = quantized[0].shape
    feature_tiles, rank_steps = up.shape[:2]
    n, next_rank, mp = following.inverse_smooth.shape[0], 8 * following.down.shape[1], token_tiles * tokens
    found = new_quantized(up, mp, n, next_rank, mode=HopperMode.EXACT, tokens=tokens)
    if m == 0:
        return found
    partial = up.new_empty(feature_tiles, mp, next_rank, dtype=torch.float32)
    launcher.launch(
        gelu_quantize_variant(up.dtype, tokens=tokens, next_unsigned=next_unsigned),
        (min(launcher.multiprocessors, token_tiles * feature_tiles), 1, 1),
        THREADS,
        *(*quantized, *product, *following),
        *(found[0], found[1], partial, shift),
        *(token_tiles, feature_tiles, groups, rank_steps, n, next_rank),
    )
    if next_rank:
        reduce_hidden(launcher, partial, found[2])
    return found


def new_quantized(
    like: Tensor, mp: int, k: int, rank: int, *, mode: HopperMode, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized codes, token scales and hidden of a quantized activation, on the device of `like`, in its 16-bit
    dtype. Packed from (MP, K) codes, their scales of each row and group, and (MP, R)."""
    tiles, groups = mp // tokens, k // STEP
    scales = (tiles, groups, tokens) if mode == HopperMode.EXACT else (tiles, tokens)
    return (
        like.new_empty(tiles, groups, PIECES, tokens, PIECE_BYTES, dtype=torch.uint8),
        like.new_empty(scales, dtype=torch.float32),
        like.new_empty(tiles, rank // RANK_STEP, PIECES, tokens, 8),
    )
