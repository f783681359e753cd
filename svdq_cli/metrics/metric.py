"""What a metric is, and how its package and weights are looked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from svdq_cli.errors import EnvironmentLacksError, InputError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Measured:
    """A few images at once: of the 16-bit model, of the model that is judged, and their prompts, in one order."""

    reference: Sequence[Image]
    images: Sequence[Image]
    prompts: Sequence[str]


# One figure for each image; of the kind "all images", a single one for all of them.
Measure = Callable[[Iterable[Measured]], list[float]]
# Compares an image with the 16-bit model's, judges it by its prompt alone, or judges all images together.
MetricKind = Literal["pair", "image", "all images"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: `key` in JSON, in gates and in `--fail-if`, `title` and `unit` for tables.

    `load` takes the device and the number of images that there will be. It raises EnvironmentLacksError, with the cure
    as its hint, where the metric can't be measured.
    """

    key: str
    title: str
    kind: MetricKind
    better: Literal["higher", "lower"]
    load: Callable[[torch.device, int], Measure]
    place: int  # where it is among the others
    digits: int  # after the point, in tables
    unit: str = ""
    always: bool = False  # needs no weights and no package of its own: it is never missing

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, value: float) -> str:
        """A figure as tables have it: "21.40 dB"."""
        return f"{value:.{self.digits}f}{self.unit and ' '}{self.unit}"


def each_pair(compare: Callable[[Image, Image], float]) -> Measure:
    """A figure of two images as a measure."""
    return lambda batches: [
        compare(*pair) for batch in batches for pair in zip(batch.reference, batch.images, strict=True)
    ]


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
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / name


def rgb_batch(images: Sequence[Image]) -> Tensor:
    """(B, 3, H, W) uint8 of images of one size."""
    import torch

    flat = [torch.frombuffer(bytearray(p.convert("RGB").tobytes()), dtype=torch.uint8) for p in images]
    height, width = images[0].height, images[0].width
    return torch.stack(flat).reshape(len(images), height, width, 3).permute(0, 3, 1, 2).contiguous()


def pixels_of(image: Image) -> Tensor:
    """(3, H, W) float32, 0..255."""
    return rgb_batch([image])[0].float()


def same_size_pixels(a: Image, b: Image) -> tuple[Tensor, Tensor]:
    """Of both images, (3, H, W) float32, 0..255. Raises InputError where they differ in size."""
    if a.size != b.size:
        raise InputError(
            f"images of {a.width} x {a.height} and {b.width} x {b.height} pixels cannot be compared",
            hint="generate both with the same height and width",
        )
    return pixels_of(a), pixels_of(b)
