"""The search step `means`: constant parts of inputs leave the activations for biases before anything is solved."""

from __future__ import annotations

from dataclasses import replace

from svdq_cli.conversion.solve_layers import Statistics
from svdq_cli.families import find_family
from svdq_cli.planning.means import mean_places
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.solve.means import common_mean
from svdq_cli.source.means import means_by_layer, without_means
from svdq_cli.source.model import MovedMean


def with_means_moved(prepared: Prepared, statistics: Statistics | None) -> tuple[Prepared, Statistics | None]:
    """The model with its biases changed, and statistics of what its inputs then are; both as they were where the
    recipe does not ask for it or nothing can be moved."""
    if statistics is None or "means" not in prepared.settings.steps:
        return prepared, statistics
    family = None if prepared.plan.family == "structural" else find_family(prepared.source.config)
    moved: list[MovedMean] = []
    for place in mean_places(family, prepared.inventory, prepared.plan):
        mean = common_mean([statistics(name) for name in place.measured], place.width)
        if mean is not None:
            moved.append(MovedMean(place.readers, place.producers, mean))
    source = without_means(prepared.source, tuple(moved), prepared.settings.dtype)
    widths = {linear.name: linear.in_features for linear in prepared.inventory.linears}
    by_layer = means_by_layer(moved, widths)
    means = {
        shared.name: by_layer[shared.layers[0]]
        for shared in prepared.plan.inputs
        if shared.layers[0] in by_layer
    }
    return replace(prepared, source=source), replace(statistics, means=means)
