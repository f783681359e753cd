"""Images for a page: small enough to be inlined, together no larger than a budget."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageChops, ImageOps

from svdq_cli.evaluation.image_store import ImageStore, read_image
from svdq_cli.evaluation.page.content import Shown, Variant

PAGE_IMAGE_BYTES = 16_000_000  # of all data URIs of a page: what a phone still opens at once
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


def show_images(
    image_store: ImageStore,
    ways: Sequence[Variant],
    prompts: Sequence[tuple[int, str, int]],
    figures: Sequence[dict[str, str]],
    *,
    page_folder: Path,
    budget: int = PAGE_IMAGE_BYTES,
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
        for item in _encoded(image_store, ways, prompts, figures, side, page_folder):
            spent += sum(map(len, (*item.images.values(), *item.differences.values())))
            if spent > budget:
                break
            shown.append(item)
        if len(shown) == len(prompts):
            break
    return shown


def _encoded(
    image_store: ImageStore,
    ways: Sequence[Variant],
    prompts: Sequence[tuple[int, str, int]],
    figures: Sequence[dict[str, str]],
    side: int,
    page_folder: Path,
) -> Iterator[Shown]:
    for (index, prompt, seed), said in zip(prompts, figures, strict=True):
        generated = {way.key: read_image(image_store, way.key, index) for way in ways}
        reference, *others = generated.values()
        rows = max(1, reference.height // reference.width)  # of the frames of a video
        yield Shown(
            prompt=prompt,
            seed=seed,
            width=reference.width,
            height=reference.height,
            images={key: data_uri(image, side=side * rows) for key, image in generated.items()},
            differences={
                way.key: data_uri(difference_map(reference, other), side=side * rows // 2)
                for way, other in zip(ways[1:], others, strict=True)
            },
            figures=said,
            links={key: _link(image_store.path(key, index), page_folder) for key in generated},
            reduced=max(reference.size) > side * rows,
        )


def _link(image: Path, page_folder: Path) -> str:
    return quote(Path(os.path.relpath(image, page_folder)).as_posix())


def difference_map(a: Image.Image, b: Image.Image) -> Image.Image:
    """The largest difference of the three channels, GAIN times, as brightness."""
    red, green, blue = ImageChops.difference(a.convert("RGB"), b.convert("RGB")).split()
    largest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    amplified = largest.point([min(255, GAIN * level) for level in range(256)])
    return ImageOps.colorize(amplified, black=_RAMP[0], white=_RAMP[2], mid=_RAMP[1])


def data_uri(image: Image.Image, *, side: int = SIDES[0]) -> str:
    """WebP: lossless where the image is small, else reduced to `side` pixels and lossy."""
    lossless = max(image.size) <= _LOSSLESS_SIDE
    if max(image.size) > side:
        image = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, format="WEBP", lossless=lossless, quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
