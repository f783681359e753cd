"""An allocator that is watched, and that can be small or fail."""

from __future__ import annotations

import weakref
from collections.abc import Container

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """What torch's operations allocate in this thread while it is entered.

    It fails as a GPU's allocator does where more than `limit` bytes would be alive, and at the allocations whose
    numbers are in `failing`.
    """

    def __init__(self, *, limit: float = float("inf"), failing: Container[int] = ()) -> None:
        super().__init__()
        self.limit, self.failing = limit, failing
        self.count = 0  # allocations so far
        self.most = 0  # bytes that were alive at once
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._take(tensor.untyped_storage())
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            return
        self.count += 1
        if self.count in self.failing or sum(self._alive.values()) + storage.nbytes() > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes.\n(details)"
            )
        self._alive[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, storage._cdata)
        self.most = max(self.most, sum(self._alive.values()))
