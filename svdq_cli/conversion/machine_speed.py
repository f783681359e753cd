"""How fast this machine is: a few seconds of the operations that conversions consist of.

`--plan` needs it. It is measured once and kept for a day in the user's cache, by machine, device, threads and versions;
what other programs take of the machine meanwhile is part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from svdq_cli import __version__
from svdq_cli.records import Int4, Linear, W4A4Plan, W4A4Solution
from svdq_cli.solve.costs import Rates
from svdq_cli.solve.learned import STEPS, learn_smoothing
from svdq_cli.solve.low_rank import OVERSAMPLE
from svdq_cli.solve.quantizers import fake_quantize_weight
from svdq_cli.solve.rebuild import weight_error
from svdq_cli.solve.rounding import gptq_weight
from svdq_cli.storage.atomic import write_text
from svdq_cli.storage.resources import cache_folder

SIDE = 1024  # of matrices on which much is computed
LARGE = 3072  # of those that are read and written once: past all caches, as the weights of large layers are
RANK = 32
LEAST_SECONDS = 0.25  # an operation is repeated for so long; the middle of its times counts
FRESH_FOR = 24 * 3600.0  # seconds
FILE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Speed:
    solve: Rates
    forward: float  # floating point operations a second in the dtype that models run in
    read: float  # bytes a second, from the disk
    write: float  # bytes a second, until they are on the disk
    hashed: float  # bytes a second, sha256


def speed_of(device: torch.device, dtype: torch.dtype, disk: Path) -> Speed:
    """This machine's speed, measured now unless that was done within a day. `disk`: a folder on the disk written to."""
    file = _cache_file(device, dtype, disk)
    try:
        if time.time() - file.stat().st_mtime < FRESH_FOR:
            kept = json.loads(file.read_text(encoding="utf-8"))
            return Speed(**{**kept, "solve": Rates(**kept["solve"])})
    except (OSError, ValueError, TypeError, KeyError):
        pass  # never measured, or by another version
    found = measure_speed(device, dtype, disk)
    _keep(file, json.dumps(asdict(found)))
    return found


def measure_speed(device: torch.device, dtype: torch.dtype, disk: Path) -> Speed:
    """Takes a few seconds."""
    read, write = _disk_rates(disk)
    data = bytearray(16 * 2**20)
    return Speed(
        solve=_solve_rates(device),
        forward=_matmul_rate(device, dtype),
        read=read,
        write=write,
        hashed=len(data) / _seconds(lambda: hashlib.sha256(data), torch.device("cpu")),
    )


def _solve_rates(device: torch.device) -> Rates:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float32).to(device)
    dtype, precision = torch.bfloat16, Int4()
    tiny = torch.ones(8, device=device, dtype=torch.float32)
    large = torch.randn(LARGE, LARGE, generator=generator, dtype=torch.float32).to(device)
    few = torch.randn(LARGE, RANK + OVERSAMPLE, generator=generator, dtype=torch.float32).to(device)
    narrow = weight[:, :64].contiguous()  # one block of columns: no update of those behind it
    tall = narrow.repeat(4, 1)
    identity = torch.eye(64, device=device, dtype=torch.float32)
    spread = (weight @ weight.T).double() / SIDE + torch.eye(SIDE, device=device, dtype=torch.float64)
    rows = weight[:256]
    solution = _solution(large)

    def typical(function: Callable[[], object]) -> float:
        return _seconds(function, device)

    return Rates(
        matmul=_matmul_rate(device, torch.float32),
        sketch=4 * large.numel() * few.shape[1] / typical(lambda: (few.T @ large, large @ few)),
        bases=4 * few.numel() * few.shape[1] / typical(lambda: torch.linalg.qr(few)),
        quantized=large.numel() / typical(lambda: fake_quantize_weight(large, precision, dtype=dtype)),
        compared=large.numel() / typical(lambda: weight_error(solution, large)),
        gptq=tall.numel()
        / typical(lambda: gptq_weight(tall, identity, precision, dtype=dtype, parts=(len(tall),))),
        factored=SIDE**3
        / typical(lambda: torch.linalg.cholesky(spread))
        / 1.5,  # inverses take twice as long
        learned=SIDE
        * STEPS
        / typical(
            lambda: learn_smoothing(
                torch.ones(SIDE, device=device, dtype=torch.float32),
                weight,
                rows,
                precision,
                branch=lambda s: torch.zeros_like(weight),
                weight_noise=1.0,
                seed=0,
            )
        ),
        calls=100 / typical(lambda: [tiny.add(1) for _ in range(100)]),
    )


def _solution(weight: Tensor) -> W4A4Solution:
    """A solution with arbitrary values: the time of a comparison does not depend on them."""
    n, k = weight.shape
    dtype = torch.bfloat16
    return W4A4Solution(
        plan=W4A4Plan(Linear("speed", k, n, bias=False), Int4(), RANK),
        smooth=weight.new_ones(k, dtype=dtype),
        down=weight[:RANK].to(dtype),
        up=weight[:, :RANK].to(dtype),
        codes=torch.ones_like(weight, dtype=torch.int8),
        scales=weight.new_ones(n, k // Int4.group, dtype=dtype),
        outer=None,
        bias=None,
    )


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = 8 * SIDE if device.type == "cuda" else 2 * SIDE
    matrix = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)
    return 2 * side**3 / _seconds(lambda: matrix @ matrix, device)


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes read and written a second, past the system's cache as far as it lets go of a file. Where the folder can't
    take one (a full disk, which the plan is to say), the disk of temporary files stands in."""
    with suppress(OSError):
        return _rates_in(folder)
    return _rates_in(Path(tempfile.gettempdir()))


def _rates_in(folder: Path) -> tuple[float, float]:
    data = os.urandom(2**20) * (FILE_BYTES // 2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".svdq-speed-") as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        write = FILE_BYTES / (time.perf_counter() - started)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        file.seek(0)
        file.read()
        return FILE_BYTES / (time.perf_counter() - started), write


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of several runs, after a warm-up."""
    function()
    times: list[float] = []
    while sum(times) < LEAST_SECONDS or len(times) < 2:
        _finish(device)
        started = time.perf_counter()
        function()
        _finish(device)
        times.append(time.perf_counter() - started)
    return median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cache_file(device: torch.device, dtype: torch.dtype, disk: Path) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = (
        __version__,
        torch.__version__,
        socket.gethostname(),
        name,
        str(dtype),
        torch.get_num_threads(),
        os.stat(disk).st_dev,
    )
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return cache_folder() / "speed" / f"{key}.json"


def _keep(file: Path, text: str) -> None:
    """Keep a measurement; a cache that can't be written is skipped."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text, durable=False)
    except OSError:
        return
