"""Memory below torch: the C library's, kept by the process for the next tensors where there is enough of it and given
back when a piece of work is done; and Python's search for garbage."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
_KEPT = 256 * 2**20  # bytes; tensors up to this size are put where freed ones were
_LARGE = 24 * 2**20  # bytes; weights of large layers and their codes, not what is computed block by block
_OF_THE_SYSTEM = 128 * 2**10  # bytes; glibc's own threshold


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of large tensors, of all threads from one place, and torch ask for pages of 2 MB (its
    own THP_MEM_ALLOC_ENABLE, read when it is loaded). Elsewhere this does nothing.

    By default each tensor of some megabytes is mapped afresh, and the kernel clears its pages of 4 KB one by one, which
    takes longer than what is computed with it: a data-free conversion of a billion parameters spends a fifth of its
    time there.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if mallopt := _of_glibc("mallopt"):
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, 2 * _KEPT)


def free_large_tensors_at_once() -> None:
    """What a large tensor took goes back to the system with it. For threads that take and free such tensors at times of
    their own: with one place for all, gaps that do not fit the next one add up to another third."""
    if mallopt := _of_glibc("mallopt"):
        mallopt(_MMAP_THRESHOLD, _LARGE)


def free_tensors_at_once() -> None:
    """Undo `keep_freed_memory`: what a tensor took goes back to the system with it. Slower, but no memory is idle
    between tensors of other sizes."""
    if mallopt := _of_glibc("mallopt"):
        mallopt(_MMAP_THRESHOLD, _OF_THE_SYSTEM)
        mallopt(_TRIM_THRESHOLD, _OF_THE_SYSTEM)


def return_freed_memory() -> None:
    """Give back what glibc keeps, before tensors of other sizes come: the gaps between them would add up."""
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)


@contextmanager
def unwatched_garbage() -> Generator[None, None, None]:
    """Pauses garbage collection, for the import of a large library: Python searches all of its growing number of
    objects for garbage again and again, a quarter of the time that diffusers' import takes, and there is none."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


@cache
def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None on other systems, and with a C library that lacks it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
