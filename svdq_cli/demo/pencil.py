"""The demo world drawn in pencil: colored outlines on white paper, whatever the background is called."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from svdq_cli.demo.world import PALETTE, PICTURE, RADIUS, Scene, outline

PAPER = PALETTE["white"]
LINE = 3.6  # pixels at 96x96: what the autoencoder still draws as a line
LEADS = {**PALETTE, "white": PALETTE["gray"]}  # a white pencil would not show
_OVERSAMPLE = 4


def render_in_pencil(scene: Scene, size: int = PICTURE, *, rng: random.Random | None = None) -> Image.Image:
    """The picture (RGB, size x size). `rng` moves and stretches things as `world.render` does."""
    side = size * _OVERSAMPLE
    picture = Image.new("RGB", (side, side), PAPER)
    for thing, (x, y) in zip(scene.things, scene.centers, strict=True):
        dx, dy, stretch = (rng.uniform(-1, 1) if rng else 0.0 for _ in range(3))
        center = (side * (x + dx * 1.5 / PICTURE), side * (y + dy * 1.5 / PICTURE))
        radius = side * RADIUS[thing.size] / PICTURE * (1 + 0.04 * stretch)
        points = outline(thing.shape, center=center, radius=radius)
        closed = [*points, points[0], points[1]]
        width = round(side * LINE / PICTURE)
        ImageDraw.Draw(picture).line(closed, fill=LEADS[thing.color], width=width, joint="curve")
    return picture.resize((size, size), Image.Resampling.BOX)
