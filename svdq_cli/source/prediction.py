"""What a UNet predicts, as its file says it or as it looks, against what the base's scheduler says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.source.markers import Told
from svdq_cli.source.model import Source
from svdq_cli.source.tensors import TensorEntry
from svdq_cli.storage.json_files import read_json

_PREDICTION = ("prediction_type", "rescale_betas_zero_snr")
_PLAYGROUND = "playgroundai/playground-v2.5-1024px-aesthetic"
# By which ComfyUI tells the Stable Diffusion 2 models that predict v (768 pixels): a bias near the output, which is
# twice as large there.
_SD2_BIAS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
_SD2_SPREAD = 0.09


def scheduler_config(pipeline: Path | None) -> Mapping[str, object]:
    """The config of a pipeline's scheduler; empty where it has none."""
    file = pipeline / "scheduler" / "scheduler_config.json" if pipeline else None
    return read_json(file) if file and file.is_file() else {}


def needed_settings(source: Source) -> Mapping[str, object]:
    """What a model needs of whatever scheduler it is run with: what its file says or, where that is silent, what its
    pipeline's scheduler has been set to for it."""
    if source.scheduler or source.component != "unet":
        return source.scheduler
    found = scheduler_config(source.pipeline)
    if found.get("prediction_type") != "v_prediction":
        return {}
    return {key: value for key, value in found.items() if key in _PREDICTION and value}


def has_settings(pipeline: Path | None, settings: Mapping[str, object]) -> bool:
    """Whether a pipeline's scheduler is set so already."""
    return settings.items() <= scheduler_config(pipeline).items()


def prediction_warnings(
    path: Path,
    told: Told,
    base: Path | None,
    config: Mapping[str, object],
    tensors: Mapping[str, TensorEntry],
) -> tuple[str, ...]:
    """What changes in the output's scheduler, and what looks as if it should.

    Raises InputError (kind `wrong-base`) where the model needs more of another pipeline than a scheduler's settings.
    """
    found = scheduler_config(base)
    if not told.scheduler:
        return _looks_otherwise(path, base, found, config, tensors)
    settings = ", ".join(f"{key.lstrip('_')} {value}" for key, value in told.scheduler.items())
    says = "says" if len(told.by) == 1 else "say"
    said = f"{path}: {' and '.join(told.by)} {says} that the model needs a scheduler with {settings}"
    if base is not None and has_settings(base, told.scheduler):
        return ()
    if base is None:
        return (f"{said}; without a base there is none to set, so set that of the pipeline you run it with",)
    if "prediction_type" not in told.scheduler and not str(found.get("_class_name")).startswith("EDM"):
        raise InputError(
            f"{path}: a Playground v2.5 model ({', '.join(told.by)}), but the base {base} has a "
            f"{found.get('_class_name')} scheduler",
            hint=f"name its own pipeline: --base {_PLAYGROUND}",
            where=str(base),
            kind="wrong-base",
        )
    return (f"{said}; it is set so in the output, and for calibration and eval",)


def _looks_otherwise(
    path: Path,
    base: Path | None,
    found: Mapping[str, object],
    config: Mapping[str, object],
    tensors: Mapping[str, TensorEntry],
) -> tuple[str, ...]:
    """Stable Diffusion 2 files carry no marker, and its two kinds have the same shapes."""
    entry = tensors.get(_SD2_BIAS)
    if base is None or entry is None or config.get("cross_attention_dim") != 1024:
        return ()
    if (
        config.get("in_channels") != 4
    ):  # inpainting and depth models are of the first kind, whatever their biases
        return ()
    looks = "v_prediction" if float(entry.read().float().std(correction=0)) > _SD2_SPREAD else "epsilon"
    says = found.get("prediction_type", "epsilon")
    if says == looks:
        return ()
    size, name = (768, "2-1") if looks == "v_prediction" else (512, "2-1-base")
    return (
        f"{path}: looks like a Stable Diffusion 2 model that predicts {looks.removesuffix('_prediction')} "
        f"({size} pixels), but the scheduler of {base} is set to {says}; if images are wrong, name a base such as "
        f"stabilityai/stable-diffusion-{name}",
    )
