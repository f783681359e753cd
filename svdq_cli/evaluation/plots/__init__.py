"""The evaluation's plots, as functions of plain records and tensors that write a PNG file.

The only rooms that know matplotlib; it takes a while to import, so they are imported where a plot is made. Figures are
made without pyplot: no window, no display, no global state.
"""

from svdq_cli.evaluation.plots.closeups import Subject, plot_activations, plot_singular_values
from svdq_cli.evaluation.plots.ranks import LayerRank, plot_ranks
from svdq_cli.evaluation.plots.sqnr import LayerSteps, plot_layers

__all__ = [
    "LayerRank",
    "LayerSteps",
    "Subject",
    "plot_activations",
    "plot_layers",
    "plot_ranks",
    "plot_singular_values",
]
