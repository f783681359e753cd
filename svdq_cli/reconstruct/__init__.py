"""The model itself, run as a whole: its tuning for the effort `best`, the fit of its last linear, and what
each layer's noise does to the output, for the ranks. Ours."""

from svdq_cli.reconstruct.block_graph import BlockGraph, block_graph_of
from svdq_cli.reconstruct.calls import Call, Trajectory, mapped, record_each, record_trajectories, tensors_of
from svdq_cli.reconstruct.gains import output_gains
from svdq_cli.reconstruct.run import (
    FittedOutput,
    Reconstruction,
    Recording,
    blocks_of,
    fit_output,
)
from svdq_cli.reconstruct.tensor_cache import TensorCache
from svdq_cli.reconstruct.tuning import tune_model

__all__ = [
    "BlockGraph",
    "Call",
    "FittedOutput",
    "Reconstruction",
    "Recording",
    "TensorCache",
    "Trajectory",
    "block_graph_of",
    "blocks_of",
    "fit_output",
    "mapped",
    "output_gains",
    "record_each",
    "record_trajectories",
    "tensors_of",
    "tune_model",
]
