"""The engine's functions on torch tensors: allocate the results, pass addresses. Layouts: `pack.cpu_panels`."""

from __future__ import annotations

import ctypes
import functools
import sys
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.cpu.build import built_library
from svdq_cli.cpu.instruction_sets import InstructionSet, best_here
from svdq_cli.errors import EnvironmentLacksError, OutOfResourcesError
from svdq_cli.pack.cpu_panels import BLOCK, STEP
from svdq_cli.pack.padding import ceil_div, round_up
from svdq_cli.records import NvFp4, Precision

BETWEEN_BYTES = 8 * 2**20  # of a GELU's results that wait to be quantized


class _Quantized(Structure):
    _fields_ = [("codes", c_void_p), ("scales", c_void_p), ("starts", c_void_p), ("hidden", c_void_p)]


class _Weights(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("codes", "scales", "up", "outer", "bias")),
        *((name, c_int64) for name in ("n", "k", "rank")),
    ]


class _Quantizer(Structure):
    _fields_ = [
        *(("smooth", c_void_p), ("down", c_void_p), ("k", c_int64), ("rank", c_int64)),
        *(("unsigned_from", c_int64), ("shift", c_float)),
    ]


class _W4A16Weights(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("codes", "scales", "bias")),
        *((name, c_int64) for name in ("n", "k")),
    ]


class _Heads(Structure):
    _fields_ = [("at", c_void_p), *((name, c_int64) for name in ("batch", "head", "row"))]


class _Attention(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batches", "heads", "queries", "keys", "size")),
        *(("scale", c_float), ("bias", c_void_p)),
    ]


class Engine:
    """A loaded library. Its calls let other Python threads run, use `torch.get_num_threads()` threads, and give the
    same bits for any number of them."""

    def __init__(self, isa: InstructionSet) -> None:
        """Raises EnvironmentLacksError where the library can neither be found nor made."""
        self.isa = isa
        path = built_library(isa)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise EnvironmentLacksError(
                f"svdq's CPU engine can't be loaded: {error}",
                hint="delete that file, or use --backend reference",
                where=str(path),
                kind="engine-not-loaded",
            ) from error
        self._quantize = _function(
            library.svdq_quantize,
            *(
                c_void_p,
                c_int32,
                c_int64,
                c_int64,
                POINTER(_Quantizer),
                POINTER(_Quantized),
                c_int32,
                c_int32,
                c_int64,
            ),
        )
        self._multiply = _function(
            library.svdq_multiply,
            *(POINTER(_Quantized), c_int64, POINTER(_Weights), c_void_p, c_int32, c_int32, c_int32, c_int64),
        )
        self._multiply_quantize = _function(
            library.svdq_multiply_quantize,
            *(POINTER(_Quantized), c_int64, POINTER(_Weights), c_void_p, POINTER(_Quantizer)),
            *(POINTER(_Quantized), c_void_p, c_int32, c_int64, c_int64),
            *(c_void_p, c_int64, c_int32, c_int32, c_int64),
        )
        self._w4a16 = _function(
            library.svdq_w4a16,
            *(c_void_p, c_int64, POINTER(_W4A16Weights), c_void_p, c_void_p, c_int32, c_int64),
        )
        self.has_attention = hasattr(library, "svdq_attention")
        if self.has_attention:
            self._attention = _function(
                library.svdq_attention, POINTER(_Attention), *(POINTER(_Heads),) * 4, c_int64
            )
        _function(library.svdq_use_team, c_void_p)(_team_of_torch())

    def quantize_down(
        self,
        x: Tensor,
        smooth: Tensor,
        down: Tensor,
        *,
        precision: Precision,
        unsigned_from: int | None = None,
        shift: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x` (M, K) in rows without gaps, float32 or in the dtype of `smooth` -> codes, scales and hidden. Channels
        from `unsigned_from` on, a multiple of 64, get `shift` added and codes without a sign."""
        m, k = x.shape
        out = new_quantized(m, k, down.shape[1], smooth.dtype, precision)
        how = _quantizer(smooth, down, unsigned_from, shift)
        self._quantize(
            *(x.data_ptr(), x.dtype == torch.float32, x.stride(0), m, byref(how), byref(_quantized(*out))),
            *(isinstance(precision, NvFp4), smooth.dtype == torch.bfloat16, torch.get_num_threads()),
        )
        return out

    def w4a4_gemm(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weight: Tensor,
        weight_scales: Tensor,
        up: Tensor,
        outer: Tensor | None,
        bias: Tensor | None,
        *,
        m: int,
        n: int,
        k: int,
        precision: Precision,
        float32: bool = False,
    ) -> Tensor:
        """The operands of one layer -> y (M, N) in the dtype of `up`, or the same numbers in float32."""
        y = up.new_empty(m, n, dtype=torch.float32 if float32 else up.dtype)
        layer = _weights(weight, weight_scales, up, outer, bias, n, k)
        self._multiply(
            *(byref(_quantized(codes, scales, hidden)), m, byref(layer), y.data_ptr(), float32),
            *(isinstance(precision, NvFp4), up.dtype == torch.bfloat16, torch.get_num_threads()),
        )
        return y

    def w4a4_gelu_quantize(
        self,
        codes: Tensor,
        scales: Tensor,
        hidden: Tensor,
        weight: Tensor,
        weight_scales: Tensor,
        up: Tensor,
        outer: Tensor | None,
        bias: Tensor | None,
        next_smooth: Tensor,
        next_down: Tensor,
        before: Tensor | None = None,
        *,
        m: int,
        k: int,
        precision: Precision,
        next_unsigned_from: int | None = None,
        shift: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer, GELU by tanh as torch computes it, the next layer's `quantize_down`. `before` (M, multiple of 64)
        in rows without gaps, float32 or 16-bit: what the next layer reads before the GELU's results."""
        columns = 0 if before is None else before.shape[1]
        n = next_smooth.shape[0] - columns
        rows = max(BLOCK, min(m, BETWEEN_BYTES // (2 * n)) // BLOCK * BLOCK)
        between = up.new_empty(rows, n)
        out = new_quantized(m, columns + n, next_down.shape[1], up.dtype, precision)
        layer = _weights(weight, weight_scales, up, outer, bias, n, k)
        how = _quantizer(next_smooth, next_down, next_unsigned_from, shift)
        self._multiply_quantize(
            *(byref(_quantized(codes, scales, hidden)), m, byref(layer), gelu_table(up.dtype).data_ptr()),
            *(byref(how), byref(_quantized(*out)), _address(before)),
            *(before is not None and before.dtype == torch.float32, columns),
            *(0 if before is None else before.stride(0), between.data_ptr(), rows),
            *(isinstance(precision, NvFp4), up.dtype == torch.bfloat16, torch.get_num_threads()),
        )
        return out

    def w4a16_linear(
        self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, n: int
    ) -> Tensor:
        """`x` (M, K) contiguous in the dtype of `scales` -> y (M, N)."""
        m, k = x.shape
        y, wide = x.new_empty(m, n), x.new_empty(m, k, dtype=torch.float32)
        layer = _W4A16Weights(weight.data_ptr(), scales.data_ptr(), _address(bias), n, k)
        self._w4a16(
            *(x.data_ptr(), m, byref(layer), wide.data_ptr(), y.data_ptr()),
            *(x.dtype == torch.bfloat16, torch.get_num_threads()),
        )
        return y

    def attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
        """bfloat16 `q` (B, H, M, D) and `k`, `v` (B, H, N, D) with rows without gaps, `bias` (B, N) contiguous float32
        -> (B, H, M, D), heads side by side in memory. D is even, 256 at most."""
        batches, heads, queries, size = q.shape
        out = new_attention(q)
        how = _Attention(batches, heads, queries, k.shape[2], size, scale, _address(bias))
        self._attention(
            byref(how), *(byref(_heads(each)) for each in (q, k, v, out)), torch.get_num_threads()
        )
        return out


def new_attention(q: Tensor) -> Tensor:
    """Uninitialized: what attention of `q` (B, H, M, D) gives, as a model reads it next."""
    batches, heads, queries, size = q.shape
    return q.new_empty(batches, queries, heads, size).transpose(1, 2)


def new_quantized(
    m: int, k: int, rank: int, dtype: torch.dtype, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized codes, scales and hidden vectors of a quantized activation (M, K). `dtype`: the layer's 16-bit
    one."""
    blocks, kp = ceil_div(m, BLOCK), round_up(k, STEP)
    return (
        torch.empty(blocks, kp // 4, BLOCK, 4, dtype=torch.int8),
        torch.empty(2, blocks, kp // precision.group, BLOCK, dtype=torch.float32),
        torch.empty(blocks, rank // 2, BLOCK, 2, dtype=dtype),
    )


@functools.cache
def engine() -> Engine:
    """The engine for this processor. Raises EnvironmentLacksError where there is none."""
    return engine_for(best_here().name)


@functools.cache
def engine_for(name: str) -> Engine:
    """The engine for the instruction set of that name."""
    from svdq_cli.cpu.instruction_sets import BY_NAME

    return Engine(BY_NAME[name])


def lack_of_engine() -> EnvironmentLacksError | OutOfResourcesError | None:
    """Why the engine can't run here, or None. Where it has to be compiled, a full disk is a reason too."""
    try:
        engine()
    except (EnvironmentLacksError, OutOfResourcesError) as lack:
        return lack
    return None


@functools.cache
def gelu_table(dtype: torch.dtype) -> Tensor:
    """torch's GELU by tanh of all 65,536 numbers of a 16-bit dtype, in the order of their bits. (65536,)."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return F.gelu(every, approximate="tanh")


def _function(function, *parameters):
    function.argtypes, function.restype = parameters, None
    return function


def _team_of_torch() -> int | None:
    """The address of GOMP_parallel in the OpenMP that torch has loaded; None where that is another OpenMP."""
    if sys.platform == "win32":
        return None
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _heads(tensor: Tensor) -> _Heads:
    return _Heads(tensor.data_ptr(), *tensor.stride()[:3])


def _quantized(codes: Tensor, scales: Tensor, hidden: Tensor) -> _Quantized:
    return _Quantized(codes.data_ptr(), scales[0].data_ptr(), scales[1].data_ptr(), hidden.data_ptr())


def _quantizer(smooth: Tensor, down: Tensor, unsigned_from: int | None, shift: float) -> _Quantizer:
    k = smooth.shape[0]
    return _Quantizer(
        smooth.data_ptr(),
        down.data_ptr(),
        k,
        down.shape[1],
        k if unsigned_from is None else unsigned_from,
        shift,
    )


def _weights(
    weight: Tensor,
    scales: Tensor,
    up: Tensor,
    outer: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
) -> _Weights:
    rank = 2 * up.shape[1]
    return _Weights(
        *(weight.data_ptr(), scales.data_ptr(), up.data_ptr(), _address(outer), _address(bias)), n, k, rank
    )
