"""A diffusers pipeline whose call, without arguments, samples as its model wants it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from svdq_cli.sampling.model import ModelSampling

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def with_call_defaults(pipe: DiffusionPipeline, sampling: ModelSampling) -> DiffusionPipeline:
    """`pipe` itself, its call's defaults replaced by the model's own: what `help(pipe.__call__)` shows is what is used.

    Arguments that a caller gives win, as ever. A pipeline that reads an image keeps its size rules.
    """
    own = type(pipe)
    signature = inspect.signature(own.__call__)
    wanted = _wanted(sampling, signature.parameters)
    changed = {name: value for name, value in wanted.items() if signature.parameters[name].default != value}
    if not changed:
        return pipe
    inherited = own.__call__

    @functools.wraps(inherited)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        return inherited(self, *args, **{k: v for k, v in changed.items() if k not in given}, **kwargs)

    parameters = [
        given.replace(default=changed.get(name, given.default))
        for name, given in signature.parameters.items()
    ]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    # Python looks a call up on the class: one of the same name, which diffusers goes by, with another call
    namespace = {
        "__call__": call,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    pipe.__class__ = type(own.__name__, (own,), namespace)
    return pipe


def _wanted(sampling: ModelSampling, parameters: Mapping[str, inspect.Parameter]) -> dict[str, object]:
    """Arguments by name, of those that the call takes."""
    wanted: dict[str, object] = {}
    if not any(name in parameters for name in ("image", "images", "control_image")):
        wanted |= {"height": sampling.height, "width": sampling.width}
    if sampling.differs:
        wanted |= {
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance,
            "true_cfg_scale": sampling.true_cfg,
            "max_sequence_length": sampling.max_sequence_length,
        }
    return {name: value for name, value in wanted.items() if value is not None and name in parameters}
