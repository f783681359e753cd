"""What the plots share: colors, sizes, legends, captions, files."""

from __future__ import annotations

import io
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import TypeVar

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from svdq_cli.planning.blocks import Place
from svdq_cli.storage.atomic import whole_file, write_text

# Okabe and Ito's palette, which color-blind readers can tell apart; where it is used, markers or line styles differ too
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"
INK, GREY, BAND = "#1d2126", "#8a8f96", "#f1efeb"

ON_BRIGHT = "#16191d"  # ink on a bright cell: not INK, which an SVG turns with the page's theme

# What follows the page's theme in an SVG, and what it is where there is no page around it.
_THEMED = {INK: "--plot-ink", BAND: "--plot-band"}

Value = TypeVar("Value")

WIDTH = 12.0  # inches; at matplotlib's 100 dots an inch a figure is 1200 pixels wide
HEAD = 0.75  # inches: title and legend of a figure with several panels
SMALL = 8  # points
LETTER = 0.075  # inches: the mean width of a letter of that size


def mark_blocks(axes: Axes, layers: Sequence[str], places: Mapping[str, Place]) -> None:
    """An x axis of layers, one unit each: blocks as alternating bands with as many labels as there is room for, kinds
    of blocks named below. `layers`: those of one block together."""
    axes.set_xlim(-0.5, len(layers) - 0.5)
    spans = _spans([(places[name].stack, places[name].block) for name in layers])
    for index, (_, first, last) in enumerate(spans):
        if index % 2 == 0:
            axes.axvspan(first - 0.5, last + 0.5, color=BAND, zorder=0, linewidth=0)
    per_layer = (WIDTH - 2.5) / len(layers)  # inches, at least
    ticks: list[float] = []
    labels: list[str] = []
    free = -math.inf  # inches: where the last label ends
    for _, first, last in _spans([stack for (stack, _), _, _ in spans]):
        inside = spans[first : last + 1]
        wide = LETTER * (max(len(block) for (_, block), _, _ in inside) + 1)
        width = per_layer * (inside[-1][2] - inside[0][1] + 1) / len(inside)
        for (_, block), start, end in inside[:: math.ceil(wide / width)]:
            middle = (start + end) / 2
            if block and middle * per_layer - wide / 2 >= free:
                ticks.append(middle)
                labels.append(block)
                free = middle * per_layer + wide / 2
    axes.set_xticks(ticks, labels, fontsize=SMALL)
    axes.tick_params(axis="x", length=0)
    _name_stacks(axes, _spans([places[name].stack for name in layers]), per_layer)


def _name_stacks(axes: Axes, spans: Sequence[tuple[str, int, int]], per_layer: float) -> None:
    """The name of each kind of block below its layers or, where they don't all fit, a letter and a key."""
    names = [stack or "others" for stack, _, _ in spans]
    fit = all(
        LETTER * len(name) < per_layer * (last - first + 1)
        for name, (_, first, last) in zip(names, spans, strict=True)
    )
    shown = names if fit else [chr(ord("A") + index) for index in range(len(names))]
    for text, (_, first, last) in zip(shown, spans, strict=True):
        axes.annotate(
            text,
            ((first + last) / 2, 0),
            (0, -16),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=SMALL,
        )
        if first:
            axes.axvline(first - 0.5, color=GREY, linewidth=0.8)
    key = "layers, by block" + (
        "" if fit else ": " + ", ".join(map(" ".join, zip(shown, names, strict=True)))
    )
    axes.set_xlabel(fill(key, 130), labelpad=14, fontsize=SMALL + 1)


def _spans(values: Sequence[Value]) -> list[tuple[Value, int, int]]:
    """Runs of equal values: (value, first index, last index)."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    ends = [*(start - 1 for start in starts[1:]), len(values) - 1]
    return [(values[first], first, last) for first, last in zip(starts, ends, strict=True)]


def marker_size(count: int) -> float:
    """Points: small enough for `count` markers side by side to stay apart, large enough to be seen."""
    return min(6.0, max(2.5, 500 / count))


def legend_beside(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    given = {} if handles is None else {"handles": list(handles)}
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=SMALL + 1, **given)


def head(figure: Figure, title: str, handles: Sequence[Artist]) -> None:
    """Title and one legend for all panels, above them. With a constrained layout, room is made."""
    height = figure.get_figheight()
    figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", va="top")
    figure.legend(
        handles=list(handles),
        loc="upper left",
        bbox_to_anchor=(0.005, 1 - 0.32 / height),
        ncols=8,
        frameon=False,
        fontsize=SMALL + 1,
    )
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, 0, 1, 1 - HEAD / height))


def caption(figure: Figure, text: str) -> None:
    figure.supxlabel(fill(text, 180), x=0.01, ha="left", fontsize=SMALL + 1, color=INK)


def save(figure: Figure, path: Path) -> None:
    """The figure as a PNG at `path`, and as an SVG of the same name for pages: without background, its text as text,
    ink and bands in the colors of the page that it is put into."""
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    written = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(written, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML declaration, which has no place in a page
    for color, variable in _THEMED.items():
        svg = svg.replace(f": {color}", f": var({variable}, {color})")
    write_text(path.with_suffix(".svg"), svg)


@contextmanager
def themed() -> Generator[None, None, None]:
    """Inside, or in a function that it decorates, matplotlib draws axes, ticks and text with INK."""
    keys = (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "xtick.color",
        "ytick.color",
        "axes.titlecolor",
    )
    with rc_context(dict.fromkeys(keys, INK)):
        yield
