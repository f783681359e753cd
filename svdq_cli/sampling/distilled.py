"""Models that were distilled to a few steps: told by their configs and, where these are silent, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svdq_cli.source import Source, pipeline_index
from svdq_cli.storage.json_files import read_json


@dataclass(frozen=True, slots=True)
class Distillation:
    """`guidance`: the scale that the model is called with. `keeps_guidance`: the scale is an input of the model, and
    stays what its class assumes."""

    steps: int
    guidance: float
    basis: str
    max_sequence_length: int | None = None
    keeps_guidance: bool = False


def distillation_of(source: Source, loras: Sequence[str] = ()) -> Distillation | None:
    """Steps and guidance of a distilled model; None for one that is not, as far as one can see."""
    if source.pipeline is None:
        return None
    index = pipeline_index(source.pipeline)
    path = source.pipeline / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path) if path.is_file() else {}
    return _by_configs(source.config, index, scheduler) or _by_names(source, index, loras)


def _by_configs(
    config: Mapping[str, object], index: Mapping[str, object], scheduler: Mapping[str, object]
) -> Distillation | None:
    pipeline, kind = str(index.get("_class_name")), str(scheduler.get("_class_name"))
    if index.get("is_distilled") is True:  # FLUX.2 klein
        return Distillation(4, 1.0, "model_index.json: is_distilled")
    if "Sprint" in pipeline or pipeline.startswith("LatentConsistency"):
        return None  # the class is a distilled model's own, and so are its defaults
    if kind in ("LCMScheduler", "FlowMatchLCMScheduler"):
        conditioned = config.get("time_cond_proj_dim") is not None
        return Distillation(
            4, 8.0 if conditioned else 1.0, f"scheduler: {kind}", keeps_guidance=_embeds(config)
        )
    if kind == "TCDScheduler":
        return Distillation(8, 0.0, f"scheduler: {kind}", keeps_guidance=_embeds(config))
    if _is_schnell(config, scheduler):
        return Distillation(4, 0.0, "transformer: guidance_embeds is false", max_sequence_length=256)
    # Z-Image-Turbo's schedule is shifted by 3, its undistilled model's by 6
    if config.get("_class_name") == "ZImageTransformer2DModel" and scheduler.get("shift") == 3.0:
        return Distillation(9, 0.0, "scheduler: shift 3")
    # Qwen-Image's own schedule ends at 0.02; those of its distillations are shifted the same for every size
    shifts = scheduler.get("base_shift"), scheduler.get("max_shift")
    if pipeline.startswith("QwenImage") and None not in shifts and shifts[0] == shifts[1]:
        return Distillation(8, 1.0, "scheduler: base_shift is max_shift")
    return _of_stable_diffusion(config, kind, scheduler)


def _is_schnell(config: Mapping[str, object], scheduler: Mapping[str, object]) -> bool:
    """FLUX.1-schnell has no guidance input, and a schedule that is the same for every size."""
    flux = config.get("_class_name") == "FluxTransformer2DModel"
    return flux and config.get("guidance_embeds") is False and scheduler.get("use_dynamic_shifting") is False


def _of_stable_diffusion(
    config: Mapping[str, object], kind: str, scheduler: Mapping[str, object]
) -> Distillation | None:
    """Turbo and Lightning take the last timestep first. Models of zero terminal SNR do, too, in many steps."""
    euler = kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    trailing = scheduler.get("timestep_spacing") == "trailing"
    of_noise = scheduler.get("prediction_type", "epsilon") == "epsilon"
    whole = scheduler.get("rescale_betas_zero_snr") is not True
    if config.get("_class_name") == "UNet2DConditionModel" and euler and trailing and of_noise and whole:
        return Distillation(4, 0.0, "scheduler: Euler with trailing timesteps")
    return None


_WORDS = re.compile(r"(?<![a-z])(turbo|lightning|schnell|lcm|hyper|dmd2?|sprint|tcd|distill(?:ed)?)(?![a-z])")
_UNDONE = re.compile(r"de[-_. ]?(turbo|distill|schnell)")
_COUNT = re.compile(r"(?<![0-9])([1-9]|1[0-6])[-_ ]?steps?(?![a-z])")


def _by_names(source: Source, index: Mapping[str, object], loras: Sequence[str]) -> Distillation | None:
    """Distillation recognized by common words in a model's name, such as "turbo", and "4-step", "8steps"."""
    own = (
        source.path.name,
        str(index.get("_name_or_path") or ""),
        str(source.config.get("_name_or_path") or ""),
    )
    for name in (*own, *loras):
        lower = re.sub(r"[^\x20-\x7e]", "", name.rstrip("/").rsplit("/", 1)[-1][:200]).lower()
        word, count = _WORDS.search(lower), _COUNT.search(lower)
        if _UNDONE.search(lower) or not (word or count):
            continue
        steps = int(count[1]) if count else 8 if word and word[1] == "hyper" else 4
        consistency = word is not None and word[1] == "lcm"
        return Distillation(
            steps, 1.0 if consistency else 0.0, f"its name, {lower}", keeps_guidance=_embeds(source.config)
        )
    return None


def _embeds(config: Mapping[str, object]) -> bool:
    """Whether the guidance scale is an input of the model, as in FLUX.1-dev."""
    return config.get("guidance_embeds") is True
