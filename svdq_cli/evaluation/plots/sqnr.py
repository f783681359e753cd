"""SQNR per layer, and what each search step bought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from svdq_cli.evaluation.plots.ranks import LayerRank
from svdq_cli.evaluation.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILION,
    WIDTH,
    caption,
    legend_beside,
    mark_blocks,
    marker_size,
    save,
    themed,
)
from svdq_cli.planning.blocks import in_blocks, places_of

_STYLES = {"learned": (SKY, "^"), "refine": (GREEN, "v"), "gptq": (BLUE, "D"), "refit": (VERMILION, "o")}
_OTHERS = ((ORANGE, "s"), (PURPLE, "P"))  # steps of checkpoints from other versions
_LEAST_GAIN = -1.0  # dB; a step that was not taken may lie far below, and is drawn at the edge


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """The search of one layer: held-out SQNR (dB) at the start and after each step that was tried, in order."""

    sqnr_db: Mapping[str, float]
    taken: frozenset[str]  # the steps that were kept; the others were tried and dropped


@themed()
def plot_layers(
    path: Path,
    sqnr_db: Mapping[str, float],
    ranks: Mapping[str, LayerRank],
    steps: Mapping[str, LayerSteps],
) -> None:
    """SQNR per converted layer, and below what each search step bought where `steps` knows it (it may be empty).

    `sqnr_db` by layer, on held-out prompts; `ranks`: every linear layer of the model.
    """
    places = places_of(list(ranks))
    layers = in_blocks([name for name in ranks if name in sqnr_db], places)
    searched = [name for name in layers if name in steps]
    heights = [4.0, 4.0, 0.8 + 0.28 * len(_step_names(steps))] if searched else [4.0]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    rows = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_sqnr(rows[0], layers, sqnr_db, ranks)
    mark_blocks(rows[0], layers, places)
    if searched:
        _draw_gains(rows[1], searched, steps)
        mark_blocks(rows[1], searched, places)
        _draw_mean_gains(rows[2], [steps[name] for name in searched])
    worst = sorted(sqnr_db, key=lambda name: sqnr_db[name])[:4]
    caption(figure, "Worst layers: " + ", ".join(f"{name} ({sqnr_db[name]:.1f}\u00a0dB)" for name in worst))
    save(figure, path)


def _draw_sqnr(
    axes: Axes, layers: Sequence[str], sqnr_db: Mapping[str, float], ranks: Mapping[str, LayerRank]
) -> None:
    for label, color, marker in (("W4A4", BLUE, "o"), ("W4A16", ORANGE, "s")):
        found = [x for x, name in enumerate(layers) if (ranks[name] == "w4a16") == (label == "W4A16")]
        if found:
            heights = [sqnr_db[layers[x]] for x in found]
            axes.plot(found, heights, marker, color=color, markersize=marker_size(len(layers)), label=label)
    mean = sum(sqnr_db.values()) / len(sqnr_db)
    axes.axhline(mean, color=INK, linewidth=1, linestyle="--", label=f"mean {mean:.1f} dB")
    axes.set_ylabel("SQNR (dB)")
    axes.set_title("Quality of every layer's output on held-out prompts (higher is better)", loc="left")
    legend_beside(axes)


def _draw_gains(axes: Axes, layers: Sequence[str], steps: Mapping[str, LayerSteps]) -> None:
    """One column a layer: a marker where each step left it, a line from the start to what was kept."""
    size = marker_size(len(layers))
    gains = [_gains(steps[name]) for name in layers]
    kept = [
        [gain for step, gain in g.items() if step in steps[n].taken]
        for n, g in zip(layers, gains, strict=True)
    ]
    reached = [values[-1] if values else 0 for values in kept]
    axes.vlines(range(len(layers)), 0, reached, color=GREY, linewidth=min(1, 100 / len(layers)))
    for step, (color, marker) in _styles(steps).items():
        for taken, face in ((True, color), (False, "none")):
            found = [
                x
                for x, name in enumerate(layers)
                if step in gains[x] and (step in steps[name].taken) == taken
            ]
            if found:  # an empty line that is not clipped would confuse the layout
                heights = [max(gains[x][step], _LEAST_GAIN) for x in found]
                axes.plot(
                    found, heights, marker, color=color, markersize=size, markerfacecolor=face, clip_on=False
                )
    axes.axhline(0, color=INK, linewidth=1)
    axes.set_ylim(bottom=_LEAST_GAIN)
    axes.set_ylabel("gain in SQNR (dB)")
    axes.set_title(
        "Gain of each search step over the paper's method, on held-out calibration rows",
        loc="left",
    )
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=color, label=step)
        for step, (color, marker) in _styles(steps).items()
    ]
    label = "tried, rejected\n(at the edge: lower)"
    hollow = Line2D([], [], linestyle="", marker="o", color=GREY, markerfacecolor="none", label=label)
    legend_beside(axes, [*handles, hollow])


def _draw_mean_gains(axes: Axes, steps: Sequence[LayerSteps]) -> None:
    """Per step: the mean of what it added to the layers, those that did not take it counted as zero."""
    styles = _styles({str(index): each for index, each in enumerate(steps)})
    for y, (step, (color, _)) in enumerate(styles.items()):
        added = [_added(each).get(step, 0.0) for each in steps]
        mean, taken = sum(added) / len(added), sum(step in each.taken for each in steps)
        axes.barh(y, mean, color=color, height=0.6)
        text = f" {mean:+.2f} dB, accepted for {taken} of {len(steps)} layers"
        axes.text(max(mean, 0), y, text, va="center", fontsize=SMALL + 1)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(styles)), list(styles))
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlabel("mean gain in SQNR (dB)")
    axes.set_title("Mean of these layers", loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _gains(steps: LayerSteps) -> dict[str, float]:
    """Each tried step's SQNR over the start's, dB."""
    (_, start), *tried = steps.sqnr_db.items()
    return {step: sqnr - start for step, sqnr in tried}


def _added(steps: LayerSteps) -> dict[str, float]:
    """What each taken step added to what the taken steps before it had reached, dB."""
    added: dict[str, float] = {}
    reached = 0.0
    for step, gain in _gains(steps).items():
        if step in steps.taken:
            added[step], reached = gain - reached, gain
    return added


def _step_names(steps: Mapping[str, LayerSteps]) -> list[str]:
    return list(dict.fromkeys(step for each in steps.values() for step in list(each.sqnr_db)[1:]))


def _styles(steps: Mapping[str, LayerSteps]) -> dict[str, tuple[str, str]]:
    """(color, marker) of every step, in the order of the steps."""
    others = cycle(_OTHERS)
    return {step: _STYLES[step] if step in _STYLES else next(others) for step in _step_names(steps)}
