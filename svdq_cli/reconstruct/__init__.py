"""The model itself, run as a whole: block reconstruction for the effort `best`, the fit of its last linear, and what
each layer's noise does to the output, for the ranks. Ours."""

from svdq_cli.reconstruct.block_graph import BlockGraph, block_graph_of
from svdq_cli.reconstruct.calls import Call, Trajectory, mapped, record_each, record_trajectories, tensors_of
from svdq_cli.reconstruct.gains import output_gains
from svdq_cli.reconstruct.run import (
    FittedOutput,
    Reconstruction,
    Recording,
    TunedBlock,
    blocks_of,
    fit_output,
    reconstruct,
)
from svdq_cli.reconstruct.tensor_cache import TensorCache

__all__ = [
    "BlockGraph",
    "Call",
    "FittedOutput",
    "Reconstruction",
    "Recording",
    "TensorCache",
    "Trajectory",
    "TunedBlock",
    "block_graph_of",
    "blocks_of",
    "fit_output",
    "mapped",
    "output_gains",
    "reconstruct",
    "record_each",
    "record_trajectories",
    "tensors_of",
]
