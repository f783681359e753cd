"""The image size that a model was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from svdq_cli.sampling.compression import latent_scale, vae_config
from svdq_cli.source import Source

USUAL_SIDE = 1024  # pixels
_MULTIPLE = 8


def own_size(source: Source, call: Mapping[str, object]) -> tuple[int, int]:
    """(height, width) in pixels: of the denoiser's `sample_size`, else of the autoencoder's, else what the pipeline's
    class assumes, else 1024. `call`: the defaults of the pipeline's call, by argument."""
    vae = vae_config(source.pipeline)
    denoiser = _sides(source.config)
    if denoiser is not None:
        scale = latent_scale(vae)
        return _usable(denoiser[0] * scale), _usable(denoiser[1] * scale)
    assumed = _sides({"sample_height": call.get("height"), "sample_width": call.get("width")})
    height, width = _sides(vae) or assumed or (USUAL_SIDE, USUAL_SIDE)
    return _usable(height), _usable(width)


def _sides(config: Mapping[str, object]) -> tuple[int, int] | None:
    """`sample_size` of a config, one number or two; or `sample_height` and `sample_width`."""
    size = config.get("sample_size")
    if isinstance(size, (list, tuple)) and len(size) == 2:
        height, width = cast("list[object]", list(size))
    elif size is not None:
        height = width = size
    else:
        height, width = config.get("sample_height"), config.get("sample_width")
    return (height, width) if _is_side(height) and _is_side(width) else None  # type: ignore[return-value]


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 14


def _usable(pixels: int) -> int:
    """Pipelines take multiples of 8."""
    return max(_MULTIPLE, pixels // _MULTIPLE * _MULTIPLE)
