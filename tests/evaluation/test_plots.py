"""The evaluation's plots: written, not empty, and legible with hundreds of layers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from svdq_cli.evaluation.plots import (
    LayerRank,
    LayerSteps,
    Subject,
    plot_activations,
    plot_layers,
    plot_ranks,
    plot_singular_values,
)
from svdq_cli.evaluation.plots.style import mark_blocks
from svdq_cli.evaluation.spectra import spectra_of
from svdq_cli.planning.blocks import in_blocks, places_of

VERMILION = (0xD5, 0x5E, 0x00)  # refit; and what is before smoothing, or left over
WORST = Subject("blocks.0.ff", sqnr_db=17.5, rank=16, why="worst")


def model(blocks: int, roles: tuple[str, ...] = ("to_q", "to_k", "ff")) -> dict[str, LayerRank]:
    ranks: dict[str, LayerRank] = {"embedder": "16-bit"}
    for block in range(blocks):
        ranks |= {f"blocks.{block}.{role}": 16 + 16 * (block % 3) for role in roles}
        ranks[f"blocks.{block}.norm"] = "w4a16"
    return ranks


def sqnr_of(ranks: dict[str, LayerRank]) -> dict[str, float]:
    return {name: 20.0 + len(name) for name, rank in ranks.items() if rank != "16-bit"}


def pixels(path: Path, color: tuple[int, int, int]) -> int:
    with Image.open(path) as image:
        assert image.width == 1200
        values = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(-1, 3)
    return int((values == torch.tensor(color, dtype=torch.uint8)).all(dim=1).sum())


def searched(ranks: dict[str, LayerRank], refit: float, *, taken: bool) -> dict[str, LayerSteps]:
    sqnr = {"start": 20.0, "learned": 20.5, "gptq": 22.0, "refit": refit}
    steps = LayerSteps(sqnr, frozenset(sqnr) - (set() if taken else {"refit"}))
    return {name: steps for name, rank in ranks.items() if isinstance(rank, int)}


def test_layers_and_their_steps(tmp_path: Path):
    ranks = model(4)
    plot_layers(tmp_path / "with.png", sqnr_of(ranks), ranks, searched(ranks, 23.0, taken=True))
    plot_layers(tmp_path / "without.png", sqnr_of(ranks), ranks, {})
    assert pixels(tmp_path / "with.png", VERMILION) > 5000  # the bar of a whole dB
    assert pixels(tmp_path / "without.png", VERMILION) == 0
    assert pixels(tmp_path / "without.png", (0x00, 0x72, 0xB2)) > 100


def test_a_step_that_was_dropped_is_hollow_and_buys_nothing(tmp_path: Path):
    ranks = model(4)
    plot_layers(tmp_path / "dropped.png", sqnr_of(ranks), ranks, searched(ranks, 5.0, taken=False))
    assert 0 < pixels(tmp_path / "dropped.png", VERMILION) < 500  # outlines, the legend's marker, no bar


@pytest.mark.parametrize(("blocks", "roles"), [(2, 3), (60, 8), (700, 1)])
def test_block_labels_never_overlap(blocks: int, roles: int):
    names = [f"a_stack.{b}.role_{r}" for b in range(blocks) for r in range(roles + 1)]
    names += [f"another.{b}.attentions.{b}.role_{r}" for b in range(11) for r in range(2)]
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.add_subplot()
    places = places_of(names)
    mark_blocks(axes, in_blocks(names, places), places)
    figure.draw_without_rendering()
    boxes = sorted(
        (label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()),
        key=lambda b: b.x0,
    )
    assert len(boxes) >= 3
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_singular_values_and_activations(tmp_path: Path):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=draw)
    found = spectra_of(weight, torch.rand(64, generator=draw) + 0.5, torch.zeros(32, 64))
    before = torch.rand(64, generator=draw) * 100
    before[0] = 0  # a dead channel has no place on a logarithmic axis
    plot_singular_values(tmp_path / "singular_values.png", [(WORST, found)] * 4)
    plot_activations(tmp_path / "activations.png", [(WORST, before, before / 10)])
    for name in ("singular_values.png", "activations.png"):
        assert pixels(tmp_path / name, VERMILION) > 200


@pytest.mark.parametrize("blocks", [2, 57])
def test_the_rank_map_shows_every_layer_in_its_color(tmp_path: Path, blocks: int):
    ranks = model(blocks)
    plot_ranks(tmp_path / "ranks.png", ranks)
    assert pixels(tmp_path / "ranks.png", (0xF3, 0xD9, 0xA4)) > 50 * blocks  # W4A16, less its hatching
    uniform: dict[str, LayerRank] = {
        name: 16 if isinstance(rank, int) else rank for name, rank in ranks.items()
    }
    plot_ranks(tmp_path / "uniform.png", uniform)
    assert (tmp_path / "uniform.png").read_bytes() != (tmp_path / "ranks.png").read_bytes()
