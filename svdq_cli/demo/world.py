"""The world of the embedded demo model: one or two flat shapes on a plain background.

A scene, its caption and its image are three views of one record, so a program can check what a model generated.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

from svdq_cli.errors import InputError

IMAGE = 96  # pixels a side
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 44, 46),
    "green": (44, 158, 66),
    "blue": (44, 88, 214),
    "yellow": (248, 216, 48),
    "orange": (242, 130, 30),
    "purple": (134, 58, 178),
    "white": (245, 245, 245),
    "black": (28, 28, 30),
    "gray": (140, 142, 148),
    "pink": (246, 162, 198),
}
OBJECT_COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
BACKGROUNDS = tuple(PALETTE)
RADIUS = {"small": 12.0, "large": 19.0}  # pixels at 96x96
PLACES: dict[
    str, tuple[float, float]
] = {  # caption words -> center of the object (x, y), as a share of a side
    "in the center": (0.5, 0.5),
    "at the top left": (0.27, 0.27),
    "at the top right": (0.73, 0.27),
    "at the bottom left": (0.27, 0.73),
    "at the bottom right": (0.73, 0.73),
}
RELATIONS: dict[
    str, tuple[tuple[float, float], tuple[float, float]]
] = {  # centers of first and second object
    "left of": ((0.26, 0.5), (0.74, 0.5)),
    "right of": ((0.74, 0.5), (0.26, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
}
OPPOSITE = {"right of": "left of", "below": "above"}


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what a caption says about it."""

    size: str
    color: str
    shape: str


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing at a place, or two things in a relation, on a background.

    `layout` is a key of PLACES (one thing) or of RELATIONS (two things, read as first-relation-second).
    """

    things: tuple[Thing, ...]
    layout: str
    background: str

    @property
    def centers(self) -> tuple[tuple[float, float], ...]:
        """Where each thing belongs, (x, y) as a share of a side."""
        return (PLACES[self.layout],) if len(self.things) == 1 else RELATIONS[self.layout]


def sample_scene(rng: random.Random) -> Scene:
    """A scene drawn evenly over the choices; a third of them hold one thing."""
    count = 1 if rng.random() < 1 / 3 else 2
    colors = rng.sample(OBJECT_COLORS, count)
    things = tuple(Thing(rng.choice(SIZES), color, rng.choice(SHAPES)) for color in colors)
    layout = rng.choice(tuple(PLACES) if count == 1 else tuple(RELATIONS))
    background = rng.choice([name for name in BACKGROUNDS if name not in colors])
    return Scene(things, layout, background)


def caption_of(scene: Scene, *, long: bool = False) -> str:
    """The caption; `long` is the second wording ("on a white background", "to the left of")."""
    phrases = [f"a {thing.size} {thing.color} {thing.shape}" for thing in scene.things]
    layout = f"to the {scene.layout}" if long and scene.layout in ("left of", "right of") else scene.layout
    middle = f"{phrases[0]} {layout}" + (f" {phrases[1]}" if len(phrases) == 2 else "")
    article = "an" if scene.background == "orange" else "a"
    return (
        f"{middle} on {article} {scene.background} background" if long else f"{middle} on {scene.background}"
    )


def parse_caption(text: str) -> Scene:
    """The scene a caption describes, for both wordings. Raises InputError."""
    body, found, background = text.strip().rpartition(" on ")
    background = background.removeprefix("an ").removeprefix("a ").removesuffix(" background")
    if not found or background not in BACKGROUNDS:
        raise InputError(f"unknown background in {text!r}", hint="a caption ends like 'on white'")
    for place in PLACES:
        if body.endswith(" " + place):
            return Scene((_parse_thing(body.removesuffix(" " + place), text),), place, background)
    for relation in RELATIONS:
        first, found, second = body.replace(" to the ", " ").partition(f" {relation} ")
        if found:
            return Scene((_parse_thing(first, text), _parse_thing(second, text)), relation, background)
    raise InputError(
        f"unknown place or relation in {text!r}", hint=f"one of {', '.join([*PLACES, *RELATIONS])}"
    )


def _parse_thing(phrase: str, text: str) -> Thing:
    match phrase.split():
        case ["a", size, color, shape] if size in SIZES and color in OBJECT_COLORS and shape in SHAPES:
            return Thing(size, color, shape)
    raise InputError(f"unknown object {phrase!r} in {text!r}", hint="one reads like 'a small red circle'")


def is_held_out(caption: str) -> bool:
    """Whether a caption's scene is kept out of training (one in sixteen).

    Decided on one canonical caption per image: "A right of B" and "B left of A", in either wording, fall on the
    same side, so a held-out image was never trained under another caption.
    """
    scene = parse_caption(caption)
    if scene.layout in OPPOSITE:
        scene = Scene(scene.things[::-1], OPPOSITE[scene.layout], scene.background)
    return hashlib.sha256(caption_of(scene).encode()).digest()[-1] % 16 == 0


def sample_captions(count: int, *, held_out: bool, seed: int) -> list[str]:
    """`count` different captions from one side of the split, in both wordings."""
    rng = random.Random(seed)
    captions: dict[str, None] = {}
    while len(captions) < count:
        caption = caption_of(sample_scene(rng), long=rng.random() < 0.25)
        if is_held_out(caption) == held_out:
            captions[caption] = None
    return list(captions)


def outline(shape: str, *, center: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Polygon of a shape around `center`; `radius` is in the unit of `center`."""
    x, y = center
    match shape:
        case "circle":
            unit = [(math.cos(turn * math.tau / 72), math.sin(turn * math.tau / 72)) for turn in range(72)]
        case "square":
            unit = [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
        case "triangle":
            unit = [(0.0, -1.05), (1.08, 0.85), (-1.08, 0.85)]
        case "star":
            polar = [(1.16 if point % 2 == 0 else 0.5, math.tau * (point / 10 - 0.25)) for point in range(10)]
            unit = [(r * math.cos(turn), r * math.sin(turn) + 0.06) for r, turn in polar]
        case _:
            raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")
    return [(x + radius * dx, y + radius * dy) for dx, dy in unit]


def render(scene: Scene, size: int = IMAGE, *, rng: random.Random | None = None) -> Image.Image:
    """The image (RGB, size x size). `rng` moves each object by up to 1.5 px of 96 and its radius by up to 4 %."""
    oversample = 4
    side = size * oversample
    image = _shaded(PALETTE[scene.background], side, top=1.05, bottom=0.93).copy()
    for thing, (x, y) in zip(scene.things, scene.centers, strict=True):
        dx, dy, stretch = (rng.uniform(-1, 1) if rng else 0.0 for _ in range(3))
        center = (side * (x + dx * 1.5 / IMAGE), side * (y + dy * 1.5 / IMAGE))
        radius = side * RADIUS[thing.size] / IMAGE * (1 + 0.04 * stretch)
        _draw_thing(image, thing, center=center, radius=radius, rim=side * 1.3 / IMAGE)
    return image.resize((size, size), Image.Resampling.BOX)


def _draw_thing(
    image: Image.Image, thing: Thing, *, center: tuple[float, float], radius: float, rim: float
) -> None:
    """A lit fill with a slightly darker rim of `rim` pixels inside the outline."""
    points = outline(thing.shape, center=center, radius=radius)
    fill = _shaded(PALETTE[thing.color], image.width, top=1.0, bottom=1.0)
    dark = _shaded(PALETTE[thing.color], image.width, top=0.84, bottom=0.84)
    body = Image.new("L", image.size, 0)
    ImageDraw.Draw(body).polygon(points, fill=255)
    edge = Image.new("L", image.size, 0)
    ImageDraw.Draw(edge).line([*points, points[0], points[1]], fill=255, width=round(2 * rim), joint="curve")
    image.paste(fill, (0, 0), body)
    image.paste(dark, (0, 0), ImageChops.multiply(body, edge))


@cache
def _shaded(color: tuple[int, int, int], side: int, *, top: float, bottom: float) -> Image.Image:
    """A plain square whose brightness runs from `top` to `bottom` times the color."""
    column = Image.new("RGB", (1, side))
    for row in range(side):
        gain = top + (bottom - top) * row / (side - 1)
        column.putpixel((0, row), tuple(min(255, round(part * gain)) for part in color))
    return column.resize((side, side))


def write_prompt_lists(folder: Path) -> list[Path]:
    """Write demo_calibration.txt (training side) and demo_eval.txt (held-out side), 64 captions each."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, held_out, seed in (("demo_calibration.txt", False, 64), ("demo_eval.txt", True, 65)):
        path = folder / name
        text = "".join(f"{caption}\n" for caption in sample_captions(64, held_out=held_out, seed=seed))
        path.write_bytes(text.encode("ascii"))
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo model's two prompt lists.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("calib_prompts"))
    for path in write_prompt_lists(parser.parse_args().folder):
        print(path)


if __name__ == "__main__":
    main()
