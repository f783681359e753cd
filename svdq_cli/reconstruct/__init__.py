"""Block reconstruction: smoothing factors, low-rank branches, scales and biases of a transformer block are tuned
together until the 4-bit block gives the 16-bit block's output. Ours; the effort `best`."""

from svdq_cli.reconstruct.run import reconstruct, record_calls

__all__ = ["reconstruct", "record_calls"]
