"""What a metric is, and how its package and weights are looked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from svdq_cli.errors import EnvironmentLacksError

# (reference pictures, other pictures) -> one figure for each pair
PairMetric = Callable[[Sequence[Image], Sequence[Image]], list[float]]
# (pictures, their prompts) -> one figure for each picture
PictureMetric = Callable[[Sequence[Image], Sequence[str]], list[float]]


def require_package(name: str, *, metric: str, install: str) -> Any:
    """The imported package. Raises EnvironmentLacksError where it is missing or can't be imported."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise EnvironmentLacksError(
            f"{metric} needs the package {error.name or name}", hint=install, where=name
        ) from error
    except Exception as error:  # a package built for another torch fails in ways of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentLacksError(
            f"{metric} needs {name}, which can't be imported: {reason}", hint=install, where=name
        ) from error


def require_weights(path: Path, *, metric: str, fetch: str) -> Path:
    """The file. Raises EnvironmentLacksError, with the command that fetches it, where it is missing."""
    if not path.is_file():
        raise EnvironmentLacksError(f"{metric} needs its weights, {path.name}", hint=fetch, where=str(path))
    return path


def hub_checkpoint(name: str) -> Path:
    """Where torch.hub keeps a downloaded file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def rgb_batch(pictures: Sequence[Image]) -> Tensor:
    """(B, 3, H, W) uint8 of pictures of one size."""
    flat = [torch.frombuffer(bytearray(p.convert("RGB").tobytes()), dtype=torch.uint8) for p in pictures]
    height, width = pictures[0].height, pictures[0].width
    return torch.stack(flat).reshape(len(pictures), height, width, 3).permute(0, 3, 1, 2).contiguous()
