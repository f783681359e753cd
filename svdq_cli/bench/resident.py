"""Memory of this process, as the system counts it: what a CPU's benchmark has instead of a GPU's allocator."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import psutil

from svdq_cli.system.allocator import return_freed_memory

EVERY = 0.002  # seconds between two looks


def resident_bytes() -> int:
    """Bytes resident now, after unused memory was returned to the system."""
    gc.collect()
    return_freed_memory()
    return psutil.Process().memory_info().rss


def peak_resident_bytes(call: Callable[[], object]) -> int:
    """The most that was in memory while `call` ran, as looked at every two milliseconds. It counts what the C library
    keeps of freed tensors (see `system.allocator.free_tensors_at_once`)."""
    process, done = psutil.Process(), threading.Event()
    most = process.memory_info().rss

    def look() -> None:
        nonlocal most
        while not done.wait(EVERY):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return most
