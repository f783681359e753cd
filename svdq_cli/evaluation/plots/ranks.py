"""The rank map: what became of every linear layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from svdq_cli.evaluation.plots.style import GREY, HEAD, LETTER, ON_BRIGHT, SMALL, WIDTH, head, save, themed
from svdq_cli.planning.blocks import Place, in_blocks, places_of

LayerRank = int | Literal["w4a16", "16-bit"]

_KEPT_COLORS: dict[LayerRank, tuple[str, str, str]] = {  # face, hatch, label
    "w4a16": ("#f3d9a4", "//", "W4A16, no branch"),
    "16-bit": ("none", "xxx", "kept at 16 bits"),
}
# inches
_CELL_HEIGHT, _MOST_WIDTH = 0.24, 0.5
_MARGIN, _ABOVE, _BELOW = 0.2, 0.3, 0.4  # around a grid: its title above, its blocks below


@themed()
def plot_ranks(path: Path, ranks: Mapping[str, LayerRank]) -> None:
    """A map of every linear layer: rank by color, blocks from left to right, a grid each kind of block."""
    places = places_of(list(ranks))
    stacks = list(dict.fromkeys(places[name].stack for name in in_blocks(ranks, places)))
    shelves = _shelves([_Grid.of(stack, places) for stack in stacks])
    at: dict[Place, LayerRank] = {places[name]: rank for name, rank in ranks.items()}
    colors = _rank_colors(ranks)
    height = HEAD + sum(_ABOVE + max(grid.height for grid in shelf) + _BELOW for shelf in shelves)
    figure = Figure(figsize=(WIDTH, height))
    top = height - HEAD
    for shelf in shelves:
        left = 0.0
        for grid in shelf:
            corner = ((left + grid.left) / WIDTH, (top - _ABOVE - grid.height) / height)
            size = (grid.cell * len(grid.blocks) / WIDTH, grid.height / height)
            _draw_grid(figure.add_axes((*corner, *size)), grid, at, colors)
            left += grid.width
        top -= _ABOVE + max(grid.height for grid in shelf) + _BELOW
    head(figure, "Rank of every layer's low-rank branch, by block", _legend(ranks, colors))
    save(figure, path)


@dataclass(frozen=True, slots=True)
class _Grid:
    """The rows and columns of one kind of block. Lengths in inches."""

    title: str
    stack: str
    blocks: tuple[str, ...]
    roles: tuple[str, ...]

    @property
    def left(self) -> float:
        """Room for the roles."""
        return _MARGIN + LETTER * max(map(len, self.roles))

    @property
    def cell(self) -> float:
        """Width of a cell."""
        return min(_MOST_WIDTH, (WIDTH - self.left - _MARGIN) / len(self.blocks))

    @property
    def width(self) -> float:
        return self.left + max(self.cell * len(self.blocks), LETTER * 1.1 * len(self.title))

    @property
    def height(self) -> float:
        return _CELL_HEIGHT * len(self.roles)

    @classmethod
    def of(cls, stack: str, places: Mapping[str, Place]) -> _Grid:
        inside = [place for place in places.values() if place.stack == stack]
        blocks = tuple(dict.fromkeys(place.block for place in inside))
        roles = tuple(dict.fromkeys(place.role for place in inside))
        return cls(stack or "outside the blocks", stack, blocks, roles)


def _shelves(grids: Sequence[_Grid]) -> list[list[_Grid]]:
    """The grids in order, side by side as far as they fit."""
    shelves: list[list[_Grid]] = []
    for grid in grids:
        if shelves and sum(other.width for other in (*shelves[-1], grid)) <= WIDTH:
            shelves[-1].append(grid)
        else:
            shelves.append([grid])
    return shelves


def _draw_grid(
    axes: Axes, grid: _Grid, ranks: Mapping[Place, LayerRank], colors: Mapping[LayerRank, str]
) -> None:
    for x, block in enumerate(grid.blocks):
        for y, role in enumerate(grid.roles):
            rank = ranks.get(Place(grid.stack, block, role))
            if rank is not None:
                _draw_cell(axes, x, y, rank, colors, wide=grid.cell >= LETTER * len(str(rank)) + 0.05)
    axes.set(xlim=(0, len(grid.blocks)), ylim=(len(grid.roles), 0))
    axes.set_yticks([y + 0.5 for y in range(len(grid.roles))], grid.roles, fontsize=SMALL)
    every = math.ceil((max(map(len, grid.blocks)) * LETTER + 0.1) / grid.cell)
    shown = range(0, len(grid.blocks), every)
    axes.set_xticks([x + 0.5 for x in shown], [grid.blocks[x] for x in shown], fontsize=SMALL)
    axes.tick_params(length=0)
    axes.set_title(grid.title, loc="left", fontsize=SMALL + 1)
    axes.spines[:].set_visible(False)


def _draw_cell(
    axes: Axes, x: int, y: int, rank: LayerRank, colors: Mapping[LayerRank, str], *, wide: bool
) -> None:
    """One layer; a rank is written into it where it is wide enough."""
    if rank in _KEPT_COLORS:
        face, hatch, _ = _KEPT_COLORS[rank]
        cell = Rectangle((x, y), 1, 1, facecolor=face, edgecolor=GREY, hatch=hatch, linewidth=0.5)
        axes.add_patch(cell)
        return
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colors[rank], edgecolor="white", linewidth=0.5))
    if wide:
        ink = _text_on(colors[rank])
        axes.text(x + 0.5, y + 0.54, str(rank), color=ink, ha="center", va="center", fontsize=SMALL)


def _rank_colors(ranks: Mapping[str, LayerRank]) -> dict[LayerRank, str]:
    """Dark is a low rank, bright a high one; cividis looks alike to color-blind readers."""
    found = sorted({rank for rank in ranks.values() if isinstance(rank, int)})
    steps = max(1, len(found) - 1)
    return {rank: to_hex(colormaps["cividis"](0.15 + 0.85 * i / steps)) for i, rank in enumerate(found)}


def _text_on(color: str) -> str:
    red, green, blue = to_rgb(color)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else ON_BRIGHT


def _legend(ranks: Mapping[str, LayerRank], colors: Mapping[LayerRank, str]) -> list[Patch]:
    """Add a legend with the number of layers of each kind."""
    counts = Counter(ranks.values())
    of_ranks = [Patch(facecolor=c, label=f"{rank} ({counts[rank]})") for rank, c in colors.items()]
    return of_ranks + [
        Patch(facecolor=face, hatch=hatch, edgecolor=GREY, label=f"{label} ({counts[kind]})")
        for kind, (face, hatch, label) in _KEPT_COLORS.items()
        if counts[kind]
    ]
