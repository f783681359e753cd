"""Measurements that the Hopper kernels' design rests on; kernels/NOTES.md says what each decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from svdq_cli.bench.timing import measure
from svdq_cli.gpu.compile import Variant
from svdq_cli.gpu.launch import CudaDevice

K32 = 32
ROWS, COLUMNS = 64, 128  # of one wgmma
SECONDS = 0.1
REPEATS = 2000
L2_TILE_BYTES, L2_TILES, L2_STAGES = 20480, 1024, 8  # 20 MB, which L2 holds; 160 KB of shared memory
CODING_UNITS = {"normal": 1.0, "subnormal": 2.0**-9}
WGMMA_TYPES = {"e4m3": 0, "int8": 1, "bfloat16": 2}
SHARED_LOADS = ("LDS.128, 32 addresses", "LDS.128, 4 addresses", "LDS.64, 4 addresses", "LDS.32, 4 addresses")
PROMOTIONS = {"none": 0, "row scale": 1, "row and column scale": 2}

# ------------------------------------------------------------------------------------------ exactness


def exactness(gpu: CudaDevice) -> Iterator[dict[str, object]]:
    """Sums of int4 codes held in e4m3, against the integers.

    Codings of rows and columns: hopper_gemm.cu has subnormal rows (the weight) and normal columns.
    """
    for coding in (("subnormal", "normal"), ("normal", "normal"), ("subnormal", "subnormal")):
        for pattern in ("random", "all largest", "alternating", "random unsigned", "all largest unsigned"):
            for columns in (64, 3072):
                yield _exactness(gpu, coding, pattern, columns)


def _exactness(gpu: CudaDevice, coding: tuple[str, str], pattern: str, columns: int) -> dict[str, object]:
    rows = codes_like(pattern, ROWS, columns, seed=0)
    others = codes_like(pattern.removesuffix(" unsigned"), COLUMNS, columns, seed=1)
    unit = CODING_UNITS[coding[0]] * CODING_UNITS[coding[1]]
    wanted = rows.double() @ others.double().T
    found = _multiply(gpu, e4m3_codes(rows, coding[0]), e4m3_codes(others, coding[1])).cpu()
    return {
        **{"probe": "e4m3 sums", "coding": " x ".join(coding), "codes": pattern, "k": columns},
        **{
            "largest_sum": float(wanted.abs().max()),
            "largest_error": float((found.double() / unit - wanted).abs().max()),
        },
    }


def codes_like(pattern: str, rows: int, columns: int, *, seed: int) -> Tensor:
    """Integer codes, signed in [-8, 7] or unsigned in [0, 15]. (rows, columns)."""
    draw = torch.Generator().manual_seed(seed)
    match pattern:
        case "random":
            return torch.randint(-8, 8, (rows, columns), generator=draw)
        case "random unsigned":
            return torch.randint(0, 16, (rows, columns), generator=draw)
        case "all largest":
            return torch.full((rows, columns), -8)
        case "all largest unsigned":
            return torch.full((rows, columns), 15)
        case "alternating":
            return torch.tensor([7, -8]).repeat(rows, columns // 2)
    raise ValueError(f"unknown pattern {pattern!r}")


def e4m3_codes(codes: Tensor, coding: str) -> Tensor:
    """Codes as e4m3 bytes: as these numbers (exact up to 16), or as sign and magnitude: the number times 2^-9. Of any
    shape, which stays."""
    if coding == "normal":
        return codes.float().to(torch.float8_e4m3fn).view(torch.uint8)
    return (codes.abs() + 128 * (codes < 0)).to(torch.uint8)


def core_matrices(matrix: Tensor) -> Tensor:
    """(rows, K) bytes -> (K/32, 2, rows/8, 8, 16): 8 rows by 16 bytes are contiguous."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // 8, 8, columns // K32, 2, 16).permute(2, 3, 0, 1, 4).contiguous()


def _multiply(gpu: CudaDevice, rows: Tensor, others: Tensor) -> Tensor:
    device = torch.device("cuda", gpu.index)
    result = torch.zeros(ROWS, COLUMNS, device=device, dtype=torch.float32)
    gpu.launch(
        Variant("probes/wgmma_exact", ()),
        (1, 1, 1),
        128,
        *(core_matrices(rows).to(device), core_matrices(others).to(device), result, rows.shape[1] // K32),
    )
    return result


# ------------------------------------------------------------------------------------------ rates


def rates(gpu: CudaDevice) -> Iterator[dict[str, object]]:
    """Tera-operations a second of each instruction on numbers like int4 codes and on random bytes, rescaled or not."""
    for operand, promotion, data in _combinations():
        operands = _operands(operand, data, torch.device("cuda", gpu.index))
        variant = Variant(
            "probes/wgmma_rate", (("OPERAND", WGMMA_TYPES[operand]), ("PROMOTE", PROMOTIONS[promotion]))
        )
        columns = 32 if operand == "bfloat16" else 64
        work = 2 * 2 * ROWS * COLUMNS * columns
        found = _rate(gpu, variant, work, blocks_each=1, before=(operands,))
        yield {"probe": f"wgmma {operand}", "rescaling": promotion, "numbers": data, **found}
    for promotion in ("none", "row and column scale"):
        variant = Variant("probes/mma_rate", (("PROMOTE", PROMOTIONS[promotion]),))
        found = _rate(gpu, variant, 2 * 8 * 32 * 64 * 64, blocks_each=2, before=())
        yield {"probe": "mma.sync int8", "rescaling": promotion, "numbers": "random", **found}


def wavefronts(gpu: CudaDevice) -> Iterator[dict[str, object]]:
    """Wavefronts of a load from shared memory, against one that is known to take four."""
    device = torch.device("cuda", gpu.index)
    result = torch.zeros(gpu.multiprocessors, 256, dtype=torch.int32, device=device)
    known = 0.0
    for pattern, name in enumerate(SHARED_LOADS):
        variant = Variant("probes/shared_wavefronts", (("PATTERN", pattern),))
        call: Callable[[], None] = lambda variant=variant: gpu.launch(  # noqa: E731
            variant, (gpu.multiprocessors, 1, 1), 256, result, REPEATS
        )
        us = measure([call], seconds=SECONDS, device=device).median
        known = known or us
        yield {"probe": "shared memory", "load": name, "us": us, "wavefronts": 4 * us / known}


def l2_bandwidth(gpu: CudaDevice) -> Iterator[dict[str, object]]:
    """Bytes a cycle and multiprocessor that bulk copies bring from L2: what bounds every GEMM that is not bound by
    its instructions."""
    device = torch.device("cuda", gpu.index)
    source = torch.zeros(L2_TILES * L2_TILE_BYTES, dtype=torch.uint8, device=device)
    cycles = torch.zeros(gpu.multiprocessors, dtype=torch.int64, device=device)
    variant = l2_variant()
    call: Callable[[], None] = lambda: gpu.launch(  # noqa: E731
        variant, (gpu.multiprocessors, 1, 1), 32, source, cycles, L2_TILES, REPEATS
    )
    us = measure([call], seconds=SECONDS, device=device).median
    copied = REPEATS * L2_TILE_BYTES
    yield {
        **{"probe": "L2 bandwidth", "us": us, "tb_per_s": gpu.multiprocessors * copied / us / 1e6},
        "bytes_per_cycle": copied / float(cycles.double().mean()),
    }


def l2_variant() -> Variant:
    """The probe of L2, with its ring of tiles."""
    ring = {
        "TILE_BYTES": L2_TILE_BYTES,
        "STAGES": L2_STAGES,
        "DYNAMIC_SHARED": L2_STAGES * L2_TILE_BYTES + 128,
    }
    return Variant("probes/l2_bandwidth", tuple(ring.items()))


def _combinations() -> Iterator[tuple[str, str, str]]:
    for operand in WGMMA_TYPES:
        for promotion in PROMOTIONS if operand != "bfloat16" else ("none",):
            yield operand, promotion, "codes"
        yield operand, "none", "random"


def _operands(operand: str, data: str, device: torch.device) -> Tensor:
    """What fills the probe's shared memory: 16 KiB."""
    draw = torch.Generator().manual_seed(0)
    if data == "random":
        return torch.randint(0, 120, (16384,), generator=draw, dtype=torch.uint8).to(device)
    codes = torch.randint(-8, 8, (16384,), generator=draw)
    if operand == "e4m3":
        return e4m3_codes(codes, "normal").to(device)
    if operand == "int8":
        return codes.to(torch.int8).to(device)
    return codes[:8192].bfloat16().to(device)


def _rate(
    gpu: CudaDevice, variant: Variant, work: int, *, blocks_each: int, before: tuple[Tensor, ...]
) -> dict[str, float]:
    """`work`: operations of one block in one repeat."""
    device = torch.device("cuda", gpu.index)
    blocks = gpu.multiprocessors * blocks_each
    result = torch.zeros(blocks, 256, device=device, dtype=torch.float32)
    call: Callable[[], None] = lambda: gpu.launch(variant, (blocks, 1, 1), 256, *before, result, REPEATS)  # noqa: E731
    us = measure([call], seconds=SECONDS, device=device)
    return {"us": us.median, "tera_ops": work * blocks * REPEATS / us.median / 1e6}
