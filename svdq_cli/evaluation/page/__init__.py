"""The HTML report: one file that needs no network, from plain records."""

from svdq_cli.evaluation.page.content import (
    Figure,
    LayerRow,
    Page,
    Plot,
    ReportSection,
    Shown,
    Table,
    Variant,
)
from svdq_cli.evaluation.page.images import PAGE_IMAGE_BYTES, show_images
from svdq_cli.evaluation.page.render import render_page

__all__ = [
    "PAGE_IMAGE_BYTES",
    "Figure",
    "LayerRow",
    "Page",
    "Plot",
    "ReportSection",
    "Shown",
    "Table",
    "Variant",
    "render_page",
    "show_images",
]
