"""The four operations that diffusers takes from its `kernels` package, in torch, for a CPU.

They read the packed tensors that the real kernels read, by the unpackers of the room `pack`, and hand activations on
in a plain layout of their own: what lies between `quantize` and `gemm` is nobody else's business.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from svdq_cli.pack.codes import unpack_codes
from svdq_cli.pack.low_rank import unpack_down, unpack_up
from svdq_cli.pack.scales import unpack_micro_scales, unpack_scales, unpack_vector
from svdq_cli.pack.tiles import join_nibbles, split_nibbles
from svdq_cli.pack.w4a16 import unpack_w4a16_codes, unpack_w4a16_scales
from svdq_cli.records import Int4, NvFp4
from svdq_cli.solve.quantizers import decode_e2m1, encode_e2m1, quantize_activation


def install() -> None:
    """Make diffusers find these operations where it looks for a package called `kernels`.

    Other libraries look for that package too, so import the model's class first.
    """
    from diffusers.utils import import_utils

    module: Any = ModuleType("kernels")
    module.get_kernel = lambda *_, **__: SimpleNamespace(ops=OPS)
    sys.modules["kernels"] = module
    import_utils._kernels_available, import_utils._kernels_version = True, "0.14.0"


def quantize_w4a4_act_fuse_lora(
    x: Tensor,
    quantized: Tensor,
    scales: Tensor,
    proj_down: Tensor,
    low_rank: Tensor,
    smooth: Tensor,
    fuse_glu: bool,
    nvfp4: bool,
) -> None:
    """Fills `quantized` (M', K/2), `scales` (K/G, M') and `low_rank` (M', R) from `x` (M, K); M' is M padded."""
    assert not fuse_glu
    rows = x.shape[0]
    precision = NvFp4() if nvfp4 else Int4()
    values, group_scales = quantize_activation(x / unpack_vector(smooth), precision)
    codes = encode_e2m1(values) if nvfp4 else values.to(torch.int8)
    quantized[:rows] = join_nibbles(codes)
    scales[:, :rows] = group_scales.T.to(scales.dtype)
    low_rank[:rows] = x.float() @ unpack_down(proj_down).float().T


def gemm_w4a4(*arguments: Any) -> None:
    """Fills `out` (M, N). Arguments by position, as diffusers passes them; the unnamed ones are for fusions."""
    act, qweight, out = arguments[0:3]
    act_scales, weight_scales = arguments[4:6]
    low_rank, proj_up = arguments[8:10]
    bias, unsigned, low_rank_scales = arguments[15], arguments[19], arguments[20]
    nvfp4, tensor_scale, row_scales = arguments[22], arguments[23], arguments[24]
    assert not unsigned
    assert low_rank_scales == [1.0] * (proj_up.shape[1] // 16)

    rows = out.shape[0]
    nibbles = split_nibbles(act[:rows]).to(torch.int8)
    if nvfp4:
        activation, weight = decode_e2m1(nibbles), decode_e2m1(unpack_codes(qweight, NvFp4()))
        scales = unpack_micro_scales(weight_scales).float()
        scales = scales * tensor_scale.float() * unpack_vector(row_scales).float().unsqueeze(1)
    else:
        assert tensor_scale is None
        assert row_scales is None
        activation, weight = ((nibbles << 4) >> 4).float(), unpack_codes(qweight, Int4()).float()
        scales = unpack_scales(weight_scales).float()
    y = grouped(activation, act_scales[:, :rows].T.float()) @ grouped(weight, scales).T
    y = y + low_rank[:rows].to(out.dtype).float() @ unpack_up(proj_up).float().T
    if bias is not None:
        y = y + unpack_vector(bias).float()
    out.copy_(y)


def gemv_awq(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor, m: int, n: int, k: int, group: int
) -> Tensor:
    """(M, N) of x's dtype, at most 8 rows."""
    assert (m, k) == tuple(x.shape)
    assert m <= 8
    assert group == 64
    y = awq_gemm_w4a16_g64_int32(x, qweight, scales, zeros)
    assert y.shape == (m, n)
    return y


def awq_gemm_w4a16_g64_int32(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """(M, N) of x's dtype."""
    codes = unpack_w4a16_codes(qweight).float().unflatten(1, (-1, 64))
    groups = codes * unpack_w4a16_scales(scales).float().unsqueeze(-1)
    weight = (groups + unpack_w4a16_scales(zeros).float().unsqueeze(-1)).flatten(1)
    return (x.float() @ weight.T).to(x.dtype)


def grouped(values: Tensor, scales: Tensor) -> Tensor:
    """(M, K) times one scale per group of columns."""
    return (values.unflatten(1, (scales.shape[1], -1)) * scales.unsqueeze(-1)).flatten(1)


OPS = SimpleNamespace(
    quantize_w4a4_act_fuse_lora=quantize_w4a4_act_fuse_lora,
    gemm_w4a4=gemm_w4a4,
    gemv_awq=gemv_awq,
    awq_gemm_w4a16_g64_int32=awq_gemm_w4a16_g64_int32,
)
