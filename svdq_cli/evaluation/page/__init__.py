"""The HTML report: one file that needs no network, from plain records."""

from svdq_cli.evaluation.page.content import Chapter, Figure, LayerRow, Page, Plot, Shown, Table, Way
from svdq_cli.evaluation.page.pictures import PAGE_PICTURE_BYTES, show_pictures
from svdq_cli.evaluation.page.render import render_page

__all__ = [
    "PAGE_PICTURE_BYTES",
    "Chapter",
    "Figure",
    "LayerRow",
    "Page",
    "Plot",
    "Shown",
    "Table",
    "Way",
    "render_page",
    "show_pictures",
]
