"""Tensors of a file that are no weights but say something of the model: what it predicts, which variant it is.

They are at the top of a file or below the model's prefix, mostly empty. ComfyUI, A1111, stable-diffusion.cpp and the
trainers tell models apart by them, so that a file without one is another model to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from svdq_cli.errors import InputError
from svdq_cli.source.tensors import TensorEntry

Entry = TypeVar("Entry", bound=TensorEntry)

_UNET, _QWEN = "UNet2DConditionModel", "QwenImageTransformer2DModel"


@dataclass(frozen=True, slots=True)
class Marker:
    """A key, and what its being there says.

    `model_class` is the class that it speaks of (None: any). `config` are values of the model's config, `scheduler`
    of its pipeline's scheduler. `setting` is the scheduler's setting that the tensor's one number gives.
    """

    key: str
    model_class: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    scheduler: Mapping[str, object] = field(default_factory=dict)
    setting: str | None = None


SCALED_MARKER = "scaled_fp8"  # that 8-bit weights have scales, which are next to them
# The schedule that LDM's training code saves with the weights; a pipeline's scheduler computes it
_LDM_SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
_EDM = {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0}
MARKERS = (
    Marker(SCALED_MARKER),
    Marker("__index_timestep_zero__", _QWEN, config={"zero_cond_t": True}),  # Qwen-Image-Edit 2511
    Marker("v_pred", _UNET, scheduler={"prediction_type": "v_prediction"}),
    Marker("ztsnr", _UNET, scheduler={"rescale_betas_zero_snr": True}),
    Marker("edm_vpred.sigma_max", _UNET, scheduler=_EDM, setting="sigma_max"),  # CosXL
    Marker("edm_vpred.sigma_min", _UNET, scheduler=_EDM, setting="sigma_min"),
    # Playground v2.5: its pipeline has a scheduler and an autoencoder of its own
    Marker("edm_mean", _UNET, scheduler={"_class_name": "EDMDPMSolverMultistepScheduler"}),
    Marker("edm_std", _UNET, scheduler={"_class_name": "EDMDPMSolverMultistepScheduler"}),
    *(Marker(key, _UNET) for key in _LDM_SCHEDULE),
)
MARKER_KEYS = frozenset(marker.key for marker in MARKERS)
# Of single layers, by the end of their keys: activation scales and labels, of no use at 16 bits
LAYER_MARKERS = (".scale_input", ".input_scale", ".comfy_quant")
# Header metadata that says what a model predicts: the words of the specification, of sd-scripts and of ComfyUI
_PREDICTION_METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
_V_PREDICTION = ("v", "v_prediction")


@dataclass(frozen=True, slots=True)
class Told:
    """What a file's markers say: of the model's config and of its pipeline's scheduler, and which of them said it."""

    config: Mapping[str, object] = field(default_factory=dict)
    scheduler: Mapping[str, object] = field(default_factory=dict)
    by: tuple[str, ...] = ()


def without_markers(
    stored: Mapping[str, Entry], model_class: str | None
) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """The tensors, and those among them that are markers. `model_class`: what model they may speak of."""
    keys = {marker.key for marker in MARKERS if marker.model_class in (None, model_class)}
    markers = {name: entry for name, entry in stored.items() if name in keys}
    return {name: entry for name, entry in stored.items() if name not in keys}, markers


def told_by(markers: Mapping[str, TensorEntry], metadata: Mapping[str, str], model_class: str) -> Told:
    """What a model's markers and its file's metadata say. Raises InputError for a number that can't be one."""
    found = [marker for marker in MARKERS if marker.key in markers]
    config = {key: value for marker in found for key, value in marker.config.items()}
    if model_class != _UNET:
        return Told(config, by=tuple(marker.key for marker in found if marker.config))
    # As runtimes do: EDM comes before plain v-prediction, and only that may have a zero terminal SNR.
    classes = [marker.scheduler for marker in found if "_class_name" in marker.scheduler]
    if classes:
        speaking = [marker for marker in found if marker.scheduler == classes[0]]
        scheduler = {**classes[0], **_settings(speaking, markers)}
        return Told(config, scheduler, tuple(marker.key for marker in speaking))
    speaking = [marker for marker in found if marker.scheduler]
    by = tuple(marker.key for marker in speaking)
    if "v_pred" not in by:
        said = next((key for key in _PREDICTION_METADATA if metadata.get(key) in _V_PREDICTION), None)
        if said is None:
            return Told(config)
        by = (f"{said}={metadata[said]}", *by)
    scheduler = {key: value for marker in speaking for key, value in marker.scheduler.items()}
    return Told(config, {"prediction_type": "v_prediction", **scheduler}, by)


def _settings(speaking: Iterable[Marker], markers: Mapping[str, TensorEntry]) -> dict[str, object]:
    settings: dict[str, object] = {}
    for marker in speaking:
        if marker.setting is None:
            continue
        entry = markers[marker.key]
        number = float(entry.read().flatten()[0]) if math.prod(entry.shape) == 1 else math.nan
        if not 0 < number < math.inf:
            raise InputError(
                f"{entry.file}: {entry.origin} is not a positive number",
                hint="download the file again",
                where=entry.origin,
                kind="damaged-file",
            )
        settings[marker.setting] = number
    return settings
