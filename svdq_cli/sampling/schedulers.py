"""The scheduler of a pipeline, set to what a model was trained to predict."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from svdq_cli.errors import InputError
from svdq_cli.source import scheduler_config
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.pipeline_index import index_file

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

# What SDXL's own pipeline has; it takes every setting that a model's markers ask for.
_ABLE = "EulerDiscreteScheduler"
# The noise that Stable Diffusion's models of all versions were trained with
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def scheduler_with(pipeline: Path, settings: Mapping[str, object]) -> SchedulerMixin:
    """A pipeline folder's scheduler with other settings. Of another class where its own has no such settings.

    A zero terminal SNR is of use only if the last step of training is the first of sampling (arXiv 2305.08891).
    Raises InputError for a class that diffusers lacks, and for settings that the class refuses.
    """
    found = scheduler_config(pipeline)
    name = str(found.get("_class_name", _ABLE))
    wanted = str(settings.get("_class_name", name))
    # A pipeline made for EDM knows best which of the two solvers it takes.
    if wanted != name and not (wanted.startswith("EDM") and name.startswith("EDM")):
        found, name = {}, wanted
    elif not settings.keys() - {"_class_name"} <= inspect.signature(_class(pipeline, name)).parameters.keys():
        found, name = {**_NOISE, **{key: found[key] for key in _NOISE if key in found}}, _ABLE
    config = {**found, **settings, "_class_name": name}
    if config.get("rescale_betas_zero_snr") and config.get("timestep_spacing", "linspace") == "leading":
        config["timestep_spacing"] = "trailing"
    try:
        return cast("SchedulerMixin", cast("Any", _class(pipeline, name)).from_config(config))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"{pipeline / 'scheduler'}: {name} can't be set to {dict(settings)}: {error}",
            hint="name a base with a scheduler that fits the model",
            where=str(pipeline),
        ) from error


def write_scheduler(folder: Path, pipeline: Path, settings: Mapping[str, object]) -> None:
    """Puts that scheduler into a copy of the pipeline."""
    scheduler = scheduler_with(pipeline, settings)
    scheduler.save_pretrained(str(folder / "scheduler"))
    path = index_file(folder)
    assert path is not None  # it is a copy of a pipeline
    index = read_json(path)
    said = index.get("scheduler")
    source = said[2:] if isinstance(said, list) else []  # of a modular one
    index = {**index, "scheduler": ["diffusers", type(scheduler).__name__, *source]}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _class(pipeline: Path, name: str) -> type[SchedulerMixin]:
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    found = getattr(diffusers, name, None)
    if not (inspect.isclass(found) and issubclass(found, SchedulerMixin)):
        raise InputError(
            f"{pipeline / 'scheduler'}: {name!r} is not a scheduler of diffusers {diffusers.__version__}",
            hint="upgrade diffusers, or name a different base",
            where=str(pipeline),
        )
    return found
