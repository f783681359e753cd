"""How long a call takes: warm-up, operands that are not in the cache, one sample for each call."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from itertools import cycle, permutations

import torch
from torch import Tensor

from svdq_cli.bench.report import Microseconds
from svdq_cli.pack.padding import ceil_div

Call = Callable[[], object]

# torch does not tell; more than one core's share of the last level almost everywhere
CPU_CACHE_BYTES = 64 * 2**20
LEAST_COPIES, MOST_COPIES = 3, 256
LEAST_SAMPLES = {"cpu": 5, "cuda": 50}
MOST_SAMPLES = 10_000
LEAST_REPLAYS = 10  # of a graph of many calls, and of a call that takes long
LONG_CALL = 2e-3  # seconds, from which what the CPU takes for a launch is nothing
LEAST_REPLAY, MOST_IN_GRAPH = 1e-3, 512  # seconds a replay should take, and calls that it may hold for that
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
COPY_SECONDS = 0.2


def cache_bytes(device: torch.device) -> int:
    """The last-level cache that operands must not be found in."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return CPU_CACHE_BYTES


def copies_beyond_cache(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of operands to go round, so that none is still in the cache when its turn comes again."""
    wanted = 1 + ceil_div(cache_bytes(device), max(1, bytes_per_call))
    return min(max(wanted, LEAST_COPIES), MOST_COPIES)


def measure(calls: Sequence[Call], *, seconds: float, device: torch.device) -> Microseconds:
    """Median, 10th and 90th percentile of one call. `calls` do the same on operands of their own and take turns.

    Samples are taken for about `seconds`, and at least LEAST_SAMPLES of them. On a GPU all calls together become a CUDA
    graph, and a sample is the time between two events around its replay, over the number of calls: so the time that
    the CPU takes to launch a call is not in it. Calls that can't be captured are timed one by one.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return spread(_on_cuda(calls, seconds, device))
    (samples,) = measure_in_turns([calls], seconds=seconds)
    return spread(samples)


def measure_in_turns(ways: Sequence[Sequence[Call]], *, seconds: float) -> list[list[float]]:
    """Microseconds of calls on the CPU, for each way as many; those of one index were made in one round.

    In a round every way is called once. The order changes from round to round, as a call finds in the caches what the
    one before it left. `ways`: for each, calls that do the same on operands of their own. Samples are taken for about
    `seconds` a way, LEAST_SAMPLES of each at the least.
    """
    turns = [cycle(calls) for calls in ways]
    for each in turns:
        _warm_up(each.__next__, seconds / 4, wait=lambda: None)
    samples: list[list[float]] = [[] for _ in ways]
    started = time.perf_counter()
    together, orders = seconds * len(ways), cycle(permutations(range(len(ways))))
    while _wants_more(len(samples[0]), time.perf_counter() - started, together, LEAST_SAMPLES["cpu"]):
        for way in next(orders):
            call = next(turns[way])
            before = time.perf_counter_ns()
            call()
            samples[way].append((time.perf_counter_ns() - before) / 1e3)
    return samples


def spread(samples: Sequence[float]) -> Microseconds:
    """Median, 10th and 90th percentile of microseconds."""
    p10, median, p90 = _quantiles(torch.tensor(samples, dtype=torch.float64))
    return Microseconds(median, p10, p90)


@functools.cache
def bytes_per_microsecond(device: torch.device) -> float:
    """Speed of copying a tensor that no cache holds, read and written bytes counted."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    us = measure([lambda: target.copy_(source)], seconds=COPY_SECONDS, device=device)
    return 2 * source.nbytes / us.median


def _on_cuda(calls: Sequence[Call], seconds: float, device: torch.device) -> list[float]:
    """All calls are queued before the first is waited for: a wait between them would empty the queue."""
    turns = cycle(calls)
    each = _warm_up(turns.__next__, seconds / 4, wait=lambda: torch.cuda.synchronize(device))
    # A replay should last longer than what lies between two of them
    graph_calls = [
        next(turns) for _ in range(max(len(calls), min(MOST_IN_GRAPH, round(LEAST_REPLAY / each))))
    ]
    replay = _captured(graph_calls) if each < LONG_CALL else None
    run, calls_a_run = (replay, len(graph_calls)) if replay else (lambda: next(turns)(), 1)
    run()
    torch.cuda.synchronize(device)
    least = LEAST_REPLAYS if replay or each >= LONG_CALL else LEAST_SAMPLES["cuda"]
    replays = min(max(round(seconds / each / calls_a_run), least), MOST_SAMPLES)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)
    ]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) * 1e3 / calls_a_run for before, after in events]


def _captured(calls: Sequence[Call]) -> Call | None:
    """The calls as one CUDA graph; None where one of them can't be captured, as it waits for the GPU."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        return None
    return graph.replay


def _warm_up(next_call: Callable[[], Call], seconds: float, *, wait: Call) -> float:
    """Call for about `seconds`, at least twice. Returns the seconds of the fastest call."""
    fastest = float("inf")
    started = time.perf_counter()
    done = 0
    while done < 2 or time.perf_counter() - started < seconds:
        call = next_call()
        before = time.perf_counter()
        call()
        wait()
        fastest = min(fastest, time.perf_counter() - before)
        done += 1
    return fastest


def _wants_more(samples: int, elapsed: float, seconds: float, least: int) -> bool:
    return samples < least or (elapsed < seconds and samples < MOST_SAMPLES)


def _quantiles(samples: Tensor) -> list[float]:
    return samples.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
