"""Images for a page: small enough to be inlined, together no larger than a budget."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageChops, ImageOps

from svdq_cli.evaluation.gallery import Gallery, read_picture
from svdq_cli.evaluation.page.content import Shown, Way

PAGE_PICTURE_BYTES = 16_000_000  # of all data URIs of a page: what a phone still opens at once
# pixels; larger images are reduced to the first of them at which all fit into the budget
SIDES = (512, 384, 288)
GAIN = 8  # of difference maps: 32 levels of 255 are full brightness
_LOSSLESS_SIDE = 128  # pixels; smaller images are shown bit for bit
_QUALITY = 88
_RAMP = (
    "#000004",
    "#b63679",
    "#fcfdbf",
)  # black, magenta, cream: from dark to bright in equal steps of lightness


def show_pictures(
    gallery: Gallery,
    ways: Sequence[Way],
    prompts: Sequence[tuple[int, str, int]],
    figures: Sequence[dict[str, str]],
    *,
    page_folder: Path,
    budget: int = PAGE_PICTURE_BYTES,
) -> list[Shown]:
    """The images of `prompts` (index, prompt, seed), in this order: all where `budget` bytes allow it, else as many
    as fit in the smallest size.

    The first of `ways` is the one that the others are compared with. `figures`: for each prompt, a text by way.
    `page_folder`: where the page will be, which the links to the whole images start from.
    """
    shown: list[Shown] = []
    for side in SIDES:
        shown = []
        spent = 0
        for item in _encoded(gallery, ways, prompts, figures, side, page_folder):
            spent += sum(map(len, (*item.pictures.values(), *item.differences.values())))
            if spent > budget:
                break
            shown.append(item)
        if len(shown) == len(prompts):
            break
    return shown


def _encoded(
    gallery: Gallery,
    ways: Sequence[Way],
    prompts: Sequence[tuple[int, str, int]],
    figures: Sequence[dict[str, str]],
    side: int,
    page_folder: Path,
) -> Iterator[Shown]:
    for (index, prompt, seed), said in zip(prompts, figures, strict=True):
        drawn = {way.key: read_picture(gallery, way.key, index) for way in ways}
        reference, *others = drawn.values()
        yield Shown(
            prompt=prompt,
            seed=seed,
            width=reference.width,
            height=reference.height,
            pictures={key: data_uri(picture, side=side) for key, picture in drawn.items()},
            differences={
                way.key: data_uri(difference_map(reference, other), side=side // 2)
                for way, other in zip(ways[1:], others, strict=True)
            },
            figures=said,
            links={key: _link(gallery.path(key, index), page_folder) for key in drawn},
            reduced=max(reference.size) > side,
        )


def _link(picture: Path, page_folder: Path) -> str:
    return quote(Path(os.path.relpath(picture, page_folder)).as_posix())


def difference_map(a: Image.Image, b: Image.Image) -> Image.Image:
    """The largest difference of the three channels, GAIN times, as brightness."""
    red, green, blue = ImageChops.difference(a.convert("RGB"), b.convert("RGB")).split()
    largest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    amplified = largest.point([min(255, GAIN * level) for level in range(256)])
    return ImageOps.colorize(amplified, black=_RAMP[0], white=_RAMP[2], mid=_RAMP[1])


def data_uri(picture: Image.Image, *, side: int = SIDES[0]) -> str:
    """WebP: lossless where the image is small, else reduced to `side` pixels and lossy."""
    lossless = max(picture.size) <= _LOSSLESS_SIDE
    if max(picture.size) > side:
        picture = ImageOps.contain(picture, (side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, format="WEBP", lossless=lossless, quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
