"""ggml's matrix product of 4-bit and 8-bit weights, which stable-diffusion.cpp computes with, next to ours: where
$SVDQ_GGML names a folder with its libraries. `make bench-peers-cpu` builds them for this processor."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from svdq_cli.bench.operations import Operation

FOLDER = "SVDQ_GGML"
F32, Q4_0, Q8_0 = 0, 2, 8  # ggml_type
BLOCK = 32  # weights of a scale
LINE_ROWS = 8  # whose columns a repacked weight keeps together
NODES = 16 * 2**20  # bytes of a context: its tensors' and a graph's descriptions
FEATURES = (
    "avx2",
    "avx_vnni",
    "avx512",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "neon",
    "dotprod",
    "matmul_int8",
)


class _Parameters(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class Ggml:
    """The libraries, their functions with their types, and a backend on torch's number of threads."""

    def __init__(self, folder: Path) -> None:
        ending = "dylib" if sys.platform == "darwin" else "so"
        self.base = ctypes.CDLL(str(folder / f"libggml-base.{ending}"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / f"libggml-cpu.{ending}"), mode=ctypes.RTLD_GLOBAL)
        pointer, base = c_void_p, self.base
        self.init = _typed(base.ggml_init, pointer, _Parameters)
        self.free = _typed(base.ggml_free, None, pointer)
        self.tensor = _typed(base.ggml_new_tensor_2d, pointer, pointer, c_int, c_int64, c_int64)
        self.mul_mat = _typed(base.ggml_mul_mat, pointer, pointer, pointer, pointer)
        self.graph = _typed(base.ggml_new_graph, pointer, pointer)
        self.expand = _typed(base.ggml_build_forward_expand, None, pointer, pointer)
        self.quantize = _typed(
            base.ggml_quantize_chunk, c_size_t, c_int, pointer, pointer, c_int64, c_int64, c_int64, pointer
        )
        self.allocate = _typed(base.ggml_backend_alloc_ctx_tensors_from_buft, pointer, pointer, pointer)
        self.set = _typed(base.ggml_backend_tensor_set, None, pointer, pointer, c_size_t, c_size_t)
        self.wrap = _typed(base.ggml_backend_cpu_buffer_from_ptr, pointer, pointer, c_size_t)
        self.place = _typed(base.ggml_backend_tensor_alloc, c_int, pointer, pointer, pointer)
        self.drop = _typed(base.ggml_backend_buffer_free, None, pointer)
        self.run = _typed(base.ggml_backend_graph_compute, c_int, pointer, pointer)
        self.plain = _typed(base.ggml_backend_cpu_buffer_type, pointer)
        self.threads = _typed(self.cpu.ggml_backend_cpu_set_n_threads, None, pointer, c_int)
        self.backend = _typed(self.cpu.ggml_backend_cpu_init, pointer)()

    def context(self) -> int:
        return self.init(_Parameters(NODES, None, True))

    def features(self) -> list[str]:
        """What of this processor the libraries were built for."""
        tests = ((name, getattr(self.cpu, f"ggml_cpu_has_{name}", None)) for name in FEATURES)
        return [name for name, has in tests if has is not None and has()]

    def repacked(self) -> int | None:
        """The kind of memory whose weights ggml repacks into lines of several rows; None where it has none."""
        registry = _typed(self.cpu.ggml_backend_cpu_reg, c_void_p)()
        device = _typed(self.base.ggml_backend_reg_dev_get, c_void_p, c_void_p, c_size_t)(registry, 0)
        name_of = _typed(self.base.ggml_backend_buft_name, c_char_p, c_void_p)
        find = _typed(self.base.ggml_backend_reg_get_proc_address, c_void_p, c_void_p, c_char_p)
        address = find(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        for kind in kinds or ():
            if kind is None:
                return None
            if name_of(kind) == b"CPU_REPACK":
                return kind
        return None


@functools.cache
def ggml() -> Ggml | None:
    """The libraries that $SVDQ_GGML names; None without it."""
    folder = os.environ.get(FOLDER)
    return Ggml(Path(folder)) if folder else None


def ggml_products() -> Iterator[tuple[str, int, bool]]:
    """The products there are: name, ggml's type of the weight, whether it is repacked."""
    found = ggml()
    if found is None:
        return
    yield "ggml q4_0", Q4_0, False
    if found.repacked() is not None:
        yield "ggml q4_0 repacked", Q4_0, True
    yield "ggml q8_0", Q8_0, False


def ggml_product(weight: Tensor, kind: int, *, repacked: bool) -> Operation:
    """Weights (N, K) in ggml's blocks of 32, float32 in and out: ggml rounds the input to q8_0 itself, as part of the
    product. RuntimeError for a shape that ggml has no such product for."""
    found = ggml()
    assert found is not None
    n, k = weight.shape
    if k % BLOCK or (repacked and n % LINE_ROWS):
        raise RuntimeError(f"no blocks of {BLOCK} columns and {LINE_ROWS} rows in {n} x {k}")
    rows = weight.float().contiguous()
    stored = torch.empty(n, k // BLOCK, 2 + BLOCK * (4 if kind == Q4_0 else 8) // 8, dtype=torch.uint8)
    found.quantize(kind, rows.data_ptr(), stored.data_ptr(), 0, n, k, None)
    values = _values(stored, kind)
    name = "q4_0" if kind == Q4_0 else "q8_0"
    return Operation(
        "gemm",
        "ggml repacked" if repacked else "ggml",
        f"{name} x q8_0",
        None,
        torch.float32,
        GgmlProduct(stored, (n, k), kind, repacked=repacked),
        lambda x: x.double() @ values.double().T,
        "activations rounded to 8 bits, which the error counts; built for " + ", ".join(found.features()),
    )


class GgmlProduct(nn.Module):
    """One `ggml_mul_mat`. Copies are the same weight."""

    def __init__(self, stored: Tensor, shape: tuple[int, int], kind: int, *, repacked: bool) -> None:
        super().__init__()
        self.n, self.k = shape
        lib = self.lib = _required()
        self.context = lib.context()
        self.weight = lib.tensor(self.context, kind, self.k, self.n)
        memory = lib.repacked() if repacked else lib.plain()
        self.memory = lib.allocate(self.context, memory)
        lib.set(self.weight, stored.data_ptr(), 0, stored.nbytes)

    def __deepcopy__(self, _: object) -> GgmlProduct:
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(M, K) -> (M, N)."""
        lib, m = self.lib, x.shape[0]
        y = x.new_empty(m, self.n)
        context = lib.context()
        rows = lib.tensor(context, F32, self.k, m)
        product = lib.mul_mat(context, self.weight, rows)
        buffers = [lib.wrap(tensor.data_ptr(), tensor.nbytes) for tensor in (x, y)]
        for buffer, place, tensor in zip(buffers, (rows, product), (x, y), strict=True):
            lib.place(buffer, place, tensor.data_ptr())
        graph = lib.graph(context)
        lib.expand(graph, product)
        lib.threads(lib.backend, torch.get_num_threads())
        if status := lib.run(lib.backend, graph):
            raise RuntimeError(f"ggml failed with status {status}")
        for buffer in buffers:
            lib.drop(buffer)
        lib.free(context)
        return y


def _required() -> Ggml:
    found = ggml()
    assert found is not None
    return found


def _values(stored: Tensor, kind: int) -> Tensor:
    """(N, K) float32 of blocks (N, K/32, bytes): a float16 scale, then codes; of q4_0 the first 16 in lower nibbles."""
    scales = stored[..., :2].contiguous().view(torch.float16).float()
    codes = stored[..., 2:]
    if kind == Q4_0:
        values = torch.cat((codes & 15, codes >> 4), -1).float() - 8
    else:
        values = codes.contiguous().view(torch.int8).float()
    return (values * scales).flatten(-2)


def _typed(function, returns, *parameters):
    function.restype, function.argtypes = returns, parameters
    return function
