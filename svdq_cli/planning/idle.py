"""Layers that a pipeline runs only where it is given more than a prompt: what calibration never runs can't be
calibrated."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from svdq_cli.source import Source, denoisers_of, prefix_of

# By class: the key of a recipe's calibration with which they run, what that is, and how their names begin
_ONLY_WITH: Mapping[str, tuple[str, str, str]] = {
    "Flux3Transformer2DModel": ("image", "a reference image", "mode_blocks.image_cond."),
}


def idle_layers(source: Source, names: Collection[str], given: Collection[str]) -> dict[str, str]:
    """Of the layers `names`, those that calibration with the `given` keys of a recipe's calibration leaves out, and why
    they stay at 16 bits."""
    found: dict[str, str] = {}
    for denoiser in denoisers_of(source):
        key, what, beginning = _ONLY_WITH.get(str(denoiser.config.get("_class_name")), ("", "", ""))
        if not key or key in given:
            continue
        begins = f"{prefix_of(source.components, denoiser.component)}{beginning}"
        reason = f"the pipeline runs it with {what} alone: give one as {key} in the recipe's calibration"
        found |= {name: reason for name in names if name.startswith(begins)}
    return found
