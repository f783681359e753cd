"""Shapes of linear layers in real models, as data."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from svdq_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import device

MODULATION_ROWS = 1  # a modulation layer reads one row for each image


@dataclass(frozen=True, slots=True)
class LinearShape:
    """x (M, K) times a weight (N, K)."""

    name: str
    m: int
    k: int
    n: int
    role: Literal["w4a4", "w4a16"] = "w4a4"


@dataclass(frozen=True, slots=True)
class ShapeSet:
    name: str
    about: str
    shapes: tuple[LinearShape, ...]


DEMO = ShapeSet(
    "demo",
    "the embedded model: 8 images of 36 tokens, each with a caption of 32",
    (
        LinearShape("attention", 68 * 8, 256, 256),
        LinearShape("feed-forward up", 68 * 8, 256, 1024),
        LinearShape("feed-forward down", 68 * 8, 1024, 256),
        LinearShape("single block out", 68 * 8, 1280, 256),
        LinearShape("double modulation", 8, 256, 1536, "w4a16"),
        LinearShape("single modulation", 8, 256, 768, "w4a16"),
    ),
)

FLUX1_DEV = ShapeSet(
    "flux1-dev",
    "FLUX.1-dev at 1024 x 1024: 4096 image tokens, 512 prompt tokens",
    (
        LinearShape("double img qkv", 4096, 3072, 9216),
        LinearShape("double img out", 4096, 3072, 3072),
        LinearShape("double img fc1", 4096, 3072, 12288),
        LinearShape("double img fc2", 4096, 12288, 3072),
        LinearShape("double txt qkv", 512, 3072, 9216),
        LinearShape("double txt fc2", 512, 12288, 3072),
        LinearShape("single lin1 (fused)", 4608, 3072, 21504),
        LinearShape("single qkv", 4608, 3072, 9216),
        LinearShape("single mlp up", 4608, 3072, 12288),
        LinearShape("single lin2 (concat)", 4608, 15360, 3072),
        LinearShape("single mlp down", 4608, 12288, 3072),
        LinearShape("double modulation", MODULATION_ROWS, 3072, 18432, "w4a16"),
        LinearShape("single modulation", MODULATION_ROWS, 3072, 9216, "w4a16"),
    ),
)

SDXL = ShapeSet(
    "sdxl",
    "SDXL at 1024 x 1024, two images at once for guidance: 4096 tokens each at 640 channels, 1024 at 1280",
    (
        LinearShape("attention 640", 2 * 4096, 640, 640),
        LinearShape("feed-forward up 640", 2 * 4096, 640, 5120),
        LinearShape("feed-forward down 640", 2 * 4096, 2560, 640),
        LinearShape("attention 1280", 2 * 1024, 1280, 1280),
        LinearShape("feed-forward up 1280", 2 * 1024, 1280, 10240),
        LinearShape("feed-forward down 1280", 2 * 1024, 5120, 1280),
    ),
)

PIXART_SIGMA = ShapeSet(
    "pixart-sigma",
    "PixArt-Sigma at 1024 x 1024, two images at once for guidance: 4096 tokens each",
    (
        LinearShape("attention", 2 * 4096, 1152, 1152),
        LinearShape("feed-forward up", 2 * 4096, 1152, 4608),
        LinearShape("feed-forward down", 2 * 4096, 4608, 1152),
    ),
)

SHAPE_SETS = {shapes.name: shapes for shapes in (DEMO, FLUX1_DEV, SDXL, PIXART_SIGMA)}


def shape_set(name: str) -> ShapeSet:
    """A named set. Raises UsageError naming the sets there are."""
    try:
        return SHAPE_SETS[name]
    except KeyError:
        near = difflib.get_close_matches(name, SHAPE_SETS, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"no set of shapes is named {name!r}", hint=f"{guess}the sets are {', '.join(SHAPE_SETS)}"
        ) from None


def default_shapes(device: device) -> ShapeSet:
    """A real model's where it takes seconds, the embedded model's on a CPU."""
    return FLUX1_DEV if device.type == "cuda" else DEMO
