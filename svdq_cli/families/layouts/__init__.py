"""Where a family's layers are stored in a format's file. One module per family; a new layout is added to `LAYOUTS`."""

from __future__ import annotations

from svdq_cli.errors import UsageError
from svdq_cli.families.layouts import flux, qwen_image, sana, sdxl, z_image
from svdq_cli.families.layouts.layout import ModelLayout

LAYOUTS: tuple[ModelLayout, ...] = (
    flux.NUNCHAKU,
    flux.COMFY,
    qwen_image.NUNCHAKU,
    qwen_image.COMFY,
    z_image.NUNCHAKU,
    z_image.VLLM_OMNI,
    sdxl.NUNCHAKU,
    sana.NUNCHAKU,
)


def layout_of(family: str, format_name: str) -> ModelLayout:
    """The layout of a family in a format. Raises UsageError that names what the format can hold."""
    for layout in LAYOUTS:
        if (layout.family, layout.format) == (family, format_name):
            return layout
    known = [layout.family for layout in LAYOUTS if layout.format == format_name]
    raise UsageError(
        f"the format {format_name} has no layout for the model family {family!r}",
        hint=f"{format_name} supports {', '.join(known) or 'no family yet'}; nunchaku-lite supports every family",
        where=family,
        kind="unsupported-format",
    )
