"""What a picture of the demo world shows, measured on its pixels, against what its caption asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from svdq_cli.demo.world import (
    IMAGE,
    PALETTE,
    PLACES,
    RADIUS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    outline,
)

# brightness of the background's ends and of an object's rim, see world.render
GAINS = (1.05, 0.99, 0.93, 0.84)
LEAST_AREA = 40  # pixels of 96x96 after erosion; a small star keeps about 100
LOST = 2  # pixels that the tips of a star or triangle may fade by; the template is tried at each
LEAST_OVERLAP = 0.65  # intersection over union with the best template; below it is a blob of no shape
SIZE_LIMIT = RADIUS["small"] + RADIUS["large"]  # pixels; objects below this extent are small


@dataclass(frozen=True, slots=True)
class Found:
    """One connected area of a color that is not the background's."""

    color: str
    shape: str  # the best template
    overlap: float  # intersection over union with it
    extent: int  # pixels, longer side of the bounding box
    center: tuple[float, float]  # (x, y) as a share of a side


@dataclass(frozen=True, slots=True)
class Judgement:
    """Which of a caption's facts a picture shows. An attribute holds only if it holds for every object."""

    count: bool  # as many objects as asked for, and nothing else
    colors: bool
    shapes: bool  # of the objects with the right colors
    sizes: bool
    layout: bool  # the place of one object, the relation of two
    background: bool

    @property
    def objects_and_colors(self) -> bool:
        """Every object there once with its shape and color, nothing else, on the right background."""
        return self.count and self.colors and self.shapes and self.background

    @property
    def everything(self) -> bool:
        return self.objects_and_colors and self.sizes and self.layout


def judge(image: Image.Image, scene: Scene) -> Judgement:
    """Measure `image` (any square size; brought to 96x96) against `scene`."""
    background, objects = look(image)
    matched = [
        next((found for found in objects if found.color == thing.color), None) for thing in scene.things
    ]
    there = [found for found in matched if found is not None]
    complete = len(there) == len(scene.things)
    pairs = list(zip(scene.things, there, strict=True)) if complete else []
    return Judgement(
        count=len(objects) == len(scene.things),
        colors=complete,
        shapes=complete and all(_has_shape(found, thing) for thing, found in pairs),
        sizes=complete
        and all(("small", "large")[found.extent >= SIZE_LIMIT] == thing.size for thing, found in pairs),
        layout=complete and _layout_of([found.center for found in there]) == scene.layout,
        background=background == scene.background,
    )


def look(image: Image.Image) -> tuple[str, list[Found]]:
    """The background color and every object, largest first."""
    if image.size != (IMAGE, IMAGE):
        image = image.resize((IMAGE, IMAGE), Image.Resampling.BOX)
    labels = _nearest_color(np.asarray(image.convert("RGB"), dtype=np.float32))
    frame = np.concatenate(
        [labels[:2].ravel(), labels[-2:].ravel(), labels[:, :2].ravel(), labels[:, -2:].ravel()]
    )
    background = int(np.bincount(frame, minlength=len(PALETTE)).argmax())
    names = tuple(PALETTE)
    areas = [
        (name, area)
        for index, name in enumerate(names)
        if index != background
        for area in _areas(labels == index)
    ]
    areas.sort(key=lambda entry: -int(entry[1].sum()))
    return names[background], [_describe(name, area) for name, area in areas]


def _nearest_color(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) to (H, W) indices into PALETTE, any of the GAINS of a color counting as that color."""
    variants = np.array(
        [[np.multiply(rgb, gain) for gain in GAINS] for rgb in PALETTE.values()], dtype=np.float32
    )
    flat = np.minimum(variants, 255).reshape(-1, 3)
    distance = ((pixels[:, :, None, :] - flat) ** 2).sum(axis=-1)
    return distance.argmin(axis=-1) // len(GAINS)


def _areas(mask: np.ndarray) -> list[np.ndarray]:
    """Connected areas (H, W) bool of `mask` that hold at least LEAST_AREA pixels after an erosion by one pixel.

    The erosion drops the thin rings that antialiasing leaves between two colors.
    """
    padded = np.pad(mask, 1)
    core = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    areas = []
    while core.any():
        seed = np.zeros_like(core)
        seed[np.unravel_index(core.argmax(), core.shape)] = True
        area = _grow(seed, core)
        core = core & ~area
        if int(area.sum()) >= LEAST_AREA:
            areas.append(_grow(area, mask))
    return areas


def _grow(seed: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """All of `mask` that is 4-connected to `seed`."""
    while True:
        padded = np.pad(seed, 1)
        wider = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:] | seed
        wider &= mask
        if wider.sum() == seed.sum():
            return seed
        seed = wider


def _describe(color: str, area: np.ndarray) -> Found:
    rows, columns = np.nonzero(area.any(axis=1))[0], np.nonzero(area.any(axis=0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    box = area[top:bottom, left:right]
    overlaps = {shape: max(_overlap(box, shape, lost=lost) for lost in range(LOST + 1)) for shape in SHAPES}
    shape = max(overlaps, key=overlaps.__getitem__)
    center = ((left + right) / 2 / area.shape[1], (top + bottom) / 2 / area.shape[0])
    return Found(color, shape, overlaps[shape], max(box.shape), center)


def _overlap(box: np.ndarray, shape: str, *, lost: int) -> float:
    """Intersection over union with the template, if soft tips lost `lost` pixels on every side of the box."""
    wider = np.pad(box, lost)
    template = _template(shape, *wider.shape)
    return float((wider & template).sum() / (wider | template).sum())


@cache
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """(height, width) bool: the shape stretched to fill the box."""
    points = np.array(outline(shape, center=(0.0, 0.0), radius=1.0))
    low, high = points.min(axis=0), points.max(axis=0)
    fine = 8  # subpixels a side
    scaled = (points - low) / (high - low) * (width * fine - 1, height * fine - 1)
    canvas = Image.new("L", (width * fine, height * fine), 0)
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in scaled], fill=255)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) >= 128


def _has_shape(found: Found, thing: Thing) -> bool:
    return found.shape == thing.shape and found.overlap >= LEAST_OVERLAP


def _layout_of(centers: list[tuple[float, float]]) -> str:
    """The nearest place of one object, or the relation of the first to the second."""
    if len(centers) == 1:
        x, y = centers[0]
        return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)
    (x0, y0), (x1, y1) = centers
    offset = np.array([x1 - x0, y1 - y0])
    return max(
        RELATIONS, key=lambda name: float(offset @ np.subtract(RELATIONS[name][1], RELATIONS[name][0]))
    )
