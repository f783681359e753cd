"""A page with every part filled, for the tests that read it and the one that opens it in a browser."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from svdq_cli.evaluation.image_store import ImageStore, keep_image, open_image_store
from svdq_cli.evaluation.page import (
    Figure,
    LayerRow,
    Page,
    Plot,
    ReportSection,
    Table,
    Variant,
    show_images,
)

HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \"quoted\" 'too' & \x07 \u202egnp"
WAYS = (Variant("16bit", "16-bit"), Variant("converted", "SVDQuant int4"), Variant("rtn", "naive 4-bit"))
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text x="1" y="8">rank</text></svg>'


def image_store_of(folder: Path, count: int, side: int = 24) -> ImageStore:
    """Flat pictures: the 16-bit ones dark, the others redder."""
    image_store = open_image_store(folder, {}, [str(i) for i in range(count)], overwrite=False)
    for index in range(count):
        for level, way in enumerate(WAYS):
            keep_image(image_store, way.key, index, Image.new("RGB", (side, side), (100 * level, index, 90)))
    return image_store


def page_of(image_store: ImageStore, text: str, *, count: int = 1) -> Page:
    """Two chapters; every place that holds text from outside holds `text`."""
    figures = [{way.key: text for way in WAYS[1:]}] * count
    shown = show_images(
        image_store, WAYS, [(i, text, 7) for i in range(count)], figures, page_folder=image_store.folder
    )
    table = Table(text, (text, text), ((text, text),), text)
    sections = [
        ReportSection(
            key=key,
            title=text,
            verdict=text,
            next=text,
            warnings=[text],
            figures=[Figure(text, text, text)],
            ways=WAYS,
            scores=table,
            missing={text: text},
            shown=shown,
            shown_note=text,
            plots=[Plot(text, SVG, text)],
            tables=[table],
            layers=[LayerRow(text, text, "16", "20.1", 0.5, text)] * 20,
            recipe=text,
            provenance=table,
        )
        for key in ("one", "two")
    ]
    return Page(text, text, sections, [table], text)
