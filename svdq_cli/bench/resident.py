"""Memory of this process, as the system counts it: what a CPU's benchmark has instead of a GPU's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Callable

import psutil

EVERY = 0.002  # seconds between two looks
LARGE = 2**20  # bytes
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def resident_bytes() -> int:
    """In memory now, after everything that nobody holds was given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def peak_resident_bytes(call: Callable[[], object]) -> int:
    """The most that was in memory while `call` ran, as looked at every two milliseconds. From here on the C library
    gives large tensors back to the system when they are freed: what it would keep for later depends on what ran before,
    and no GPU's allocator counts it either."""
    _give_back_what_is_freed()
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


def _give_back_what_is_freed() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE)
