"""A close look at a few layers: singular values, and activation maxima (the SVDQuant paper's figures)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from torch import Tensor

from svdq_cli.evaluation.plots.style import (
    BLUE,
    GREY,
    HEAD,
    INK,
    SMALL,
    VERMILION,
    WIDTH,
    caption,
    head,
    save,
    themed,
)
from svdq_cli.evaluation.spectra import LEADING, Spectra

_LEAST_VALUE = 0.02  # of the largest singular value: where the plot ends, so that a zero does not stretch it


@dataclass(frozen=True, slots=True)
class Subject:
    """A W4A4 layer that is looked at closely, and why."""

    name: str
    sqnr_db: float
    rank: int
    why: Literal["worst", "typical"]


@themed()
def plot_singular_values(path: Path, spectra: Sequence[tuple[Subject, Spectra]]) -> None:
    """The decay of W, of the smoothed weight and of what the low-rank branch leaves over, a panel each layer."""
    figure, panels = _panels(len(spectra))
    for axes, (subject, found) in zip(panels, spectra, strict=True):
        for values, color, style, label in (
            (found.weight, GREY, "--", "W"),
            (found.smoothed, BLUE, "-", "smoothed: W diag(s)"),
            (found.residual, VERMILION, "-.", "residual: (W - U D) diag(s)"),
        ):
            axes.plot(range(1, len(values) + 1), _positive(values), style, color=color, label=label)
        axes.axvline(subject.rank, color=INK, linewidth=1, linestyle=":", label="rank of the branch")
        axes.set_yscale("log")
        largest = float(torch.cat([found.weight[:1], found.smoothed[:1]]).max())
        axes.set_ylim(bottom=_LEAST_VALUE * (largest or 1.0))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("index of the singular value")
        axes.set_ylabel("singular value / norm")
        _name_panel(axes, subject, f"residual: {found.left_over:.0%} of the norm")
    title = "Singular values before and after smoothing, and of the residual left to the 4 bits"
    head(figure, title, panels[0].get_legend_handles_labels()[0])
    note = (
        f"At most the leading {LEADING} values. W relative to its Frobenius norm; smoothed and residual, relative "
        "to the norm "
        "of W diag(s)."
    )
    if not all(found.exact for _, found in spectra):
        note += " Matrices with more than 4096 rows and columns: by randomized SVD; the last values are slightly low."
    caption(figure, note)
    save(figure, path)


@themed()
def plot_activations(path: Path, maxima: Sequence[tuple[Subject, Tensor, Tensor]]) -> None:
    """The largest magnitude of every input channel, (layer, before smoothing (K,), after (K,)), a panel each layer."""
    figure, panels = _panels(len(maxima))
    for axes, (subject, before, after) in zip(panels, maxima, strict=True):
        order = before.float().argsort(descending=True)
        channels = range(1, len(order) + 1)
        axes.plot(
            channels,
            _positive(after[order]),
            ".",
            color=BLUE,
            markersize=3,
            rasterized=True,  # thousands of channels would make thousands of marks in an SVG
            label="after smoothing: max |x| / s",
        )
        axes.plot(
            channels,
            _positive(before[order]),
            color=VERMILION,
            linewidth=2,
            label="before smoothing: max |x|",
        )
        axes.set_yscale("log")
        axes.set_xlabel("input channel, in descending order of max |x|")
        axes.set_ylabel("maximum magnitude")
        _name_panel(axes, subject, f"max / median {_spread(before)} → {_spread(after)}")
    title = "Activation maxima per input channel before and after smoothing"
    head(figure, title, panels[0].get_legend_handles_labels()[0])
    caption(figure, "Maxima over all tokens and timesteps of the held-out prompts used for the layer SQNR.")
    save(figure, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, 3.7 * rows + HEAD + 0.3), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _name_panel(axes: Axes, subject: Subject, fact: str) -> None:
    """The layer's name, broken after a dot where it is long, and its figures."""
    lines = [""]
    for part in subject.name.replace(".", ". ").split():
        if len(lines[-1]) + len(part) > 44:
            lines.append("")
        lines[-1] += part
    lines += [f"{subject.why}: {subject.sqnr_db:.1f} dB, rank {subject.rank}", fact]
    axes.set_title("\n".join(lines), loc="left", fontsize=SMALL + 1)
    axes.grid(alpha=0.25)


def _positive(values: Tensor) -> list[float]:
    """Values without zeros, for a logarithmic axis."""
    return [value if value > 0 else math.nan for value in values.double().tolist()]


def _spread(maxima: Tensor) -> str:
    median = float(maxima.float().median())
    return f"{float(maxima.float().max()) / median:.3g}" if median > 0 else "∞"
