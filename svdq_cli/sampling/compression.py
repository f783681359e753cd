"""How many pixels and frames an autoencoder puts into one latent: from its config, else from its class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

from svdq_cli.errors import InputError
from svdq_cli.source.classes import empty_instance
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.library_facts import library_fact

Kind = Literal["spatial", "temporal"]

USUAL_SCALE = 8  # pixels a side, of an autoencoder that says nothing
_MOST = 1024  # of a ratio: what a damaged config may say is bounded
# Whose config says all; the library, which takes seconds to import, is not asked
_WITHOUT_RATIOS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny", "AutoencoderKLFlux2")


def vae_config(pipeline: Path | None) -> Mapping[str, object]:
    """The config of a pipeline's autoencoder; empty where there is none."""
    config = pipeline / "vae" / "config.json" if pipeline else None
    return read_json(config) if config and config.is_file() else {}


def latent_scale(vae: Mapping[str, object]) -> int:
    """Pixels a side of one latent pixel, from the autoencoder's config."""
    if (said := _ratio(vae, "spatial")) is not None:
        return said
    levels = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or vae.get("dim_mult")
    return (
        2 ** (len(cast("Sequence[object]", levels)) - 1) if isinstance(levels, (list, tuple)) else USUAL_SCALE
    )


def frames_a_latent(vae: Mapping[str, object]) -> int:
    """Frames of a video that one latent frame stands for, after the first, from the autoencoder's config."""
    return _ratio(vae, "temporal") or 1


def _ratio(vae: Mapping[str, object], kind: Kind) -> int | None:
    """What the config says, else what the class makes of it; None where neither says anything."""
    for key in (f"{kind}_compression_ratio", f"scale_factor_{kind}"):
        if (said := _usable(vae.get(key))) is not None:
            return said
    joined = vae.get("temperal_downsample")  # so spelled by AutoencoderKLWan
    if kind == "temporal" and isinstance(joined, (list, tuple)):
        return _usable(2 ** sum(map(bool, joined)))
    return _of_class(vae, kind)


def _of_class(vae: Mapping[str, object], kind: Kind) -> int | None:
    name = vae.get("_class_name")
    if not isinstance(name, str) or name in _WITHOUT_RATIOS:
        return None
    config = json.dumps({key: value for key, value in vae.items() if not key.startswith("_")})

    def ask() -> Mapping[str, object]:
        model = empty_instance(name, config, "the autoencoder")
        kinds = ("spatial", "temporal")
        return {kind: _usable(getattr(model, f"{kind}_compression_ratio", None)) for kind in kinds}

    try:
        said = library_fact("autoencoder", (name, config), ask)
    except InputError:  # another version's class: the levels of the config still say something
        return None
    return cast("Mapping[str, int | None]", said)[kind]


def _usable(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST
    return value if whole else None  # type: ignore[return-value]
