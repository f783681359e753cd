"""The original names of the models that people have as single files or LoRAs, each as rules onto diffusers' names.

The rules were made from the names and shapes of published checkpoints; tests hold them against diffusers' own
single-file converters and LoRA loaders.
"""

from svdq_cli.source.names import Naming
from svdq_cli.source.original_names.ace_step import ACE_STEP
from svdq_cli.source.original_names.auraflow import AURAFLOW
from svdq_cli.source.original_names.bfl import CHROMA, FLUX1, FLUX2, FLUX3
from svdq_cli.source.original_names.cosmos import COSMOS
from svdq_cli.source.original_names.hunyuan import HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from svdq_cli.source.original_names.ideogram import IDEOGRAM4
from svdq_cli.source.original_names.krea import KREA2
from svdq_cli.source.original_names.ltx import LTX2, LTX_VIDEO
from svdq_cli.source.original_names.lumina import LUMINA2
from svdq_cli.source.original_names.minimax import MINIMAX_H3
from svdq_cli.source.original_names.mochi import MOCHI
from svdq_cli.source.original_names.pixart import PIXART, SANA
from svdq_cli.source.original_names.qwen_image import QWEN_IMAGE_21
from svdq_cli.source.original_names.stability import LDM_UNET, SD3
from svdq_cli.source.original_names.wan import WAN, WAN_ANIMATE2
from svdq_cli.source.original_names.z_image import Z_IMAGE

__all__ = [
    "CHROMA",
    "FLUX1",
    "FLUX2",
    "HUNYUAN_VIDEO_15",
    "LDM_UNET",
    "NAMINGS",
    "NAMINGS_WITH_BASE",
    "PIXART",
    "SANA",
    "SD3",
    "WAN",
    "Z_IMAGE",
    "naming_of",
]

NAMINGS: tuple[Naming, ...] = (FLUX1, FLUX2, CHROMA, Z_IMAGE, PIXART, SANA, SD3, WAN, LDM_UNET)
"""Of the classes that a file's own names tell."""

NAMINGS_WITH_BASE: tuple[Naming, ...] = (
    *(FLUX3, KREA2, MINIMAX_H3, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15, HUNYUAN_IMAGE, LTX_VIDEO, LTX2),
    *(LUMINA2, COSMOS, AURAFLOW, MOCHI, QWEN_IMAGE_21, WAN_ANIMATE2, IDEOGRAM4, ACE_STEP),
)
"""Of the classes that a base pipeline tells. Whole checkpoints are converted by diffusers where it can."""


def naming_of(model_class: str) -> Naming | None:
    """The original names of a diffusers class; None where svdq has no table for it."""
    return next((each for each in (*NAMINGS, *NAMINGS_WITH_BASE) if model_class in each.classes), None)
