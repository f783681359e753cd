"""Where tensors wait for their turn: in host memory up to a byte budget, beyond it in files."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from svdq_cli.reconstruct.calls import mapped, tensors_of
from svdq_cli.storage.tensor_file import save_tensors


class Kept:
    """A value of a shelf. Its memory, or its file, goes with it."""

    def __init__(self, value: Any, file: Path | None) -> None:
        self._value, self._file = value, file  # tensors that are stored in the file are empty ones here

    def on(self, device: torch.device) -> Any:
        """The value with its tensors on `device`: copies, which whoever gets them may change."""
        if self._file is None:
            return mapped(self._value, lambda tensor: tensor.to(device, copy=True))
        stored = iter(sorted(load_file(self._file).items()))
        return mapped(self._value, lambda tensor: (next(stored)[1] if tensor.is_meta else tensor).to(device))

    def shapes(self) -> Any:
        """The value with empty tensors: their shapes and dtypes."""
        return mapped(self._value, lambda tensor: tensor.to("meta"))


class TensorCache:
    """Keeps tuples, lists and dicts of tensors. `folder` is made when the budget is used up."""

    def __init__(self, folder: Path, *, host_bytes: int) -> None:
        self._folder, self._free = folder, host_bytes
        self._numbers = itertools.count()

    def keep(self, value: Any) -> Kept:
        size = sum(tensor.nbytes for tensor in tensors_of(value))
        if size <= self._free:
            self._free -= size
            kept = Kept(mapped(value, lambda tensor: tensor.detach().cpu()), None)
            weakref.finalize(kept, self._give_back, size)
            return kept
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"{next(self._numbers)}.safetensors"
        kept = Kept(_stored(value, file), file)
        weakref.finalize(kept, file.unlink, missing_ok=True)
        return kept

    def _give_back(self, size: int) -> None:
        self._free += size


def _stored(value: Any, file: Path) -> Any:
    """The value with empty tensors for those that it wrote to the file; safetensors knows no complex numbers."""
    stored: dict[str, Tensor] = {}

    def store(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.detach().cpu()
        stored[f"{len(stored):06}"] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return tensor.to("meta")

    emptied = mapped(value, store)
    save_tensors(file, stored, {})
    return emptied
