"""How often a denoiser runs in one step: once, or with the prompt and without it where the image is guided."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from svdq_cli.source import Source, pipeline_index
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.library_facts import library_fact

if TYPE_CHECKING:
    from collections.abc import Callable

# Of a denoiser's config: what says that it reads the strength of guidance as a number
_EMBEDDED = ("guidance_embeds", "guidance_embed", "time_cond_proj_dim")
_DISTILLED = "is_distilled"  # of a pipeline's index, which then runs no second pass (FLUX.2 [klein])
_GUIDER = "guider"  # the component that guides, in pipelines whose call does not
# Arguments of a call that guide, where none names true guidance; the first that it takes counts
_STRENGTHS = ("guidance_scale", "max_guidance_scale")
# Further arguments of a call that take a pass each while their default is above these
_FURTHER = {"stg_scale": 0.0, "modality_scale": 1.0, "pag_scale": 0.0}
# Where a pipeline's call puts the latents of both passes into one batch
_STACKED = re.compile(
    r"\[\w*(?:latent|sample|hidden)\w*\] ?\* ?2|\.repeat\(2,|\[(\w*latent\w*), \1\]|\(\w*latent\w*,\) \* 2"
)


@dataclass(frozen=True, slots=True)
class StepPasses:
    """The denoiser in one step.

    `count`: how often it sees an image, in one call or in several. `entries`: how often in one call, at most.
    """

    count: int = 1
    entries: int = 1

    @property
    def calls(self) -> int:
        """Calls of the denoiser in which it sees the image `entries` times."""
        return -(-self.count // self.entries)


ONE_PASS = StepPasses()


@dataclass(frozen=True, slots=True)
class _Guiding:
    """How a pipeline's class guides."""

    argument: str | None  # of its call, or the component that guides with a second pass; None where none does
    default: float | None  # its value
    above: float  # the strength above which it does
    stacked: bool  # whether both passes are one batch
    further: int  # passes besides, whatever guides


def step_passes(source: Source, *, guidance: float | None, true_cfg: float) -> StepPasses:
    """How the denoiser runs in one step at these strengths of guidance (None: the default of the pipeline's class).

    A second pass comes with `true_cfg` where the pipeline's call takes it, else with `guidance`, unless the model reads
    that as a number. Where nothing is known of the class, the most that is usual: both passes in one batch.
    """
    guiding = _guiding(source)
    if guiding is None:
        guiding = _Guiding("true_cfg_scale", None, 1.0, True, 0)
        guided = true_cfg > 1 or (not _embedded(source) and (guidance is None or guidance > 1))
    elif guiding.argument == "true_cfg_scale":
        guided = true_cfg > guiding.above
    elif guiding.argument == _GUIDER:
        guided = source.pipeline is None or _guider_guides(source.pipeline / _GUIDER)
    else:
        # Stable Video Diffusion's strength is not the recipe's
        own = guiding.default if guidance is None or guiding.argument != _STRENGTHS[0] else guidance
        # what the class says only when it is called counts as guided
        guided = (
            guiding.argument is not None and not _embedded(source) and (own is None or own > guiding.above)
        )
    return StepPasses(1 + guided + guiding.further, 2 if guided and guiding.stacked else 1)


def _embedded(source: Source) -> bool:
    return any(source.config.get(key) for key in _EMBEDDED)


def _guider_guides(folder: Path) -> bool:
    """Whether the guider of a folder runs a second pass; one without a file of its own does."""
    file = folder / "guider_config.json"
    config = read_json(file) if file.is_file() else {}
    strength = config.get("guidance_scale")
    return config.get("enabled") is not False and not (isinstance(strength, (int, float)) and strength <= 1)


def _guiding(source: Source) -> _Guiding | None:
    """None where the pipeline's class is not known."""
    if source.pipeline is None:
        return None
    index = pipeline_index(source.pipeline)
    if index.get(_DISTILLED):
        return _Guiding(None, None, 1.0, False, 0)
    name = str(index.get("_class_name"))
    try:
        return _Guiding(*cast("Any", library_fact("guidance", (name,), lambda: _asked(name))))
    except Exception:  # diffusers imports its classes late, and raises whatever their libraries raise
        return None


def _asked(pipeline_class: str) -> tuple[object, ...]:
    """The fields of `_Guiding`, of a class of diffusers."""
    import diffusers

    found = getattr(diffusers, pipeline_class)
    if issubclass(found, diffusers.ModularPipeline):
        guider = next((spec for spec in found().blocks.expected_components if spec.name == _GUIDER), None)
        # it calls the denoiser once for each condition
        twice = guider is not None and guider.create().num_conditions > 1
        return (_GUIDER if twice else None, None, 1.0, False, 0)
    parameters = inspect.signature(found.__call__).parameters
    further = sum(
        name in parameters and (parameters[name].default or 0) > least for name, least in _FURTHER.items()
    )
    stacked = _STACKED.search(inspect.getsource(found.__call__)) is not None
    argument, above = _second_pass(found, parameters)
    default = parameters[argument].default if argument and argument in parameters else None
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    return (argument, default if number else None, above, stacked, further)


def _second_pass(
    pipeline: type[object], parameters: Mapping[str, inspect.Parameter]
) -> tuple[str | None, float]:
    """What guides with a second pass, and above which strength."""
    if "true_cfg_scale" in parameters:
        return "true_cfg_scale", 1.0
    if _GUIDER in inspect.signature(pipeline.__init__).parameters:
        return _GUIDER, 1.0
    argument = next((name for name in _STRENGTHS if name in parameters), None)
    guides = getattr(pipeline, "do_classifier_free_guidance", None)
    says = cast("Callable[[Any], Any] | None", guides.fget) if isinstance(guides, property) else None
    if argument is None or not (
        any(n.startswith("negative_prompt") for n in parameters) or _holds(says, 2.0)
    ):
        return None, 1.0
    return argument, 0.0 if _holds(says, 0.5) else 1.0


def _holds(guides: Callable[[Any], Any] | None, strength: float) -> bool:
    """Whether the class itself says that it guides with this strength; not where it asks for more than that."""
    if guides is None:
        return False
    try:
        return bool(
            guides(SimpleNamespace(_guidance_scale=strength, guidance_scale=strength, is_turbo=False))
        )
    except Exception:  # a property may ask for any part of a pipeline
        return False
