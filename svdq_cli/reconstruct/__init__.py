"""The model itself, run with gradients: block reconstruction for the effort `best`, and what each layer's noise does to
the output, for the ranks. Ours."""

from svdq_cli.reconstruct.calls import Call, Trajectory, record_trajectories
from svdq_cli.reconstruct.gains import output_gains
from svdq_cli.reconstruct.run import reconstruct

__all__ = ["Call", "Trajectory", "output_gains", "reconstruct", "record_trajectories"]
