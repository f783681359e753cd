"""The original names of the models that people have as single files, each as rules onto diffusers' names.

The rules were made from the names and shapes of published checkpoints; a test holds them against diffusers' own
single-file converters at full size.
"""

from svdq_cli.source.names import Naming
from svdq_cli.source.original_names.bfl import CHROMA, FLUX1, FLUX2
from svdq_cli.source.original_names.pixart import PIXART, SANA
from svdq_cli.source.original_names.stability import LDM_UNET, SD3
from svdq_cli.source.original_names.wan import WAN
from svdq_cli.source.original_names.z_image import Z_IMAGE

__all__ = [
    "CHROMA",
    "FLUX1",
    "FLUX2",
    "LDM_UNET",
    "NAMINGS",
    "PIXART",
    "SANA",
    "SD3",
    "WAN",
    "Z_IMAGE",
]

NAMINGS: tuple[Naming, ...] = (FLUX1, FLUX2, CHROMA, Z_IMAGE, PIXART, SANA, SD3, WAN, LDM_UNET)
