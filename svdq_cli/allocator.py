"""The C library's memory, kept by the process instead of given back and asked for again."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_KEPT = 256 * 2**20  # bytes; numbers up to this size are put where freed ones were


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors, of all threads from one place. Elsewhere this does nothing.

    By default each tensor of some megabytes is mapped anew and its pages are cleared by the kernel, which takes longer
    than what is computed with it: a data-free conversion of a billion parameters spends a fifth of its time there.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    mallopt(_ARENA_MAX, 1)
    mallopt(_MMAP_THRESHOLD, _KEPT)
    mallopt(_TRIM_THRESHOLD, 2 * _KEPT)
