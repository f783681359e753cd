"""How a model is sampled by default: image size, steps, guidance, batch, and prompts that suit it.

This is the room's door; everything else in it is private to the room.
"""

from svdq_cli.sampling.call_defaults import with_call_defaults
from svdq_cli.sampling.file import SAMPLING_FILE
from svdq_cli.sampling.model import ModelSampling, makes_no_videos, sampling_of

__all__ = ["SAMPLING_FILE", "ModelSampling", "makes_no_videos", "sampling_of", "with_call_defaults"]
