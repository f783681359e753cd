"""Inputs that depend on the timestep alone, sampled over all timesteps.

A calibration sees the few timesteps of its own schedule; another sampler or another number of steps runs others. So a
modulation that is to be stored as a curve needs its input between them too. The denoiser is called as the pipeline
calls it, with one timestep after another, and left in its first block: what later ones read is the same.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from svdq_cli.calibration.collect import inputs_seen
from svdq_cli.errors import SvdqError, as_out_of_memory
from svdq_cli.pipelines.batches import Batch
from svdq_cli.pipelines.encode import EncodedPrompts
from svdq_cli.pipelines.first_call import first_call
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.planning.made_arguments import TIME
from svdq_cli.records import ModelPlan, SharedInput, W4A16Plan

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

TIMES = 128
_GOLDEN = 0.618033988749895
_PERTURBED = 1.125  # what all other numbers are multiplied by


class _Seen(Exception):
    """Ends a call of the model: every input was seen."""


def modulation_inputs(plan: ModelPlan) -> tuple[SharedInput, ...]:
    """Those that only W4A16 layers read: the candidates."""
    named = {layer.name for layer in plan.layers if isinstance(layer, W4A16Plan)}
    return tuple(shared for shared in plan.inputs if named.issuperset(shared.layers))


@torch.no_grad()
def inputs_over_time(
    pipe: DiffusionPipeline,
    model: nn.Module,
    inputs: Sequence[SharedInput],
    batch: Batch,
    *,
    settings: SamplingSettings,
    encoded: EncodedPrompts | None = None,
) -> dict[str, Tensor]:
    """(TIMES, K) bfloat16 of each of `inputs` that nothing but the timestep changes, by name.

    An input is left out where it has more than one row an image, changes with any other number that the pipeline gives
    the model (text, guidance, the image), or is not the one that the first such layer reads. Empty for a model that
    can't be called so; raises only where memory runs out.
    """
    try:
        given = first_call(pipe, [model], batch, settings=settings, encoded=encoded)
        if not inputs or given is None:
            return {}
        arguments = dict(inspect.signature(model.forward).bind(*given[0], **given[1]).arguments)
        return _swept(model, inputs, arguments, _train_timesteps(pipe))
    except SvdqError:
        raise
    except (
        Exception
    ) as error:  # whatever keeps a model from being called with other numbers: there is no curve
        if lack := as_out_of_memory(error):
            raise lack from error
        return {}


def _swept(
    model: nn.Module, inputs: Sequence[SharedInput], arguments: dict[str, Any], train_timesteps: int
) -> dict[str, Tensor]:
    time = next((name for name in arguments if re.fullmatch(TIME, name)), None)
    if time is None or not isinstance(arguments[time], Tensor | int | float):
        return {}
    others = {name: value if name == time else _perturbed(value) for name, value in arguments.items()}
    plain, moved = (_call(model, inputs, each) for each in (arguments, others))
    alone = [
        shared
        for shared in inputs
        if shared.name in plain
        and shared.name in moved
        and torch.equal(plain[shared.name], moved[shared.name])
        and torch.equal(plain[shared.name], plain[shared.name][:1].expand_as(plain[shared.name]))
    ]
    if not alone:
        return {}
    # Blocks read the same tensor, so that the first of them shows it: the others need not be run.
    first = min(alone, key=lambda shared: list(plain).index(shared.name))
    largest = 1.0 if float(torch.as_tensor(arguments[time]).abs().max()) <= 1.5 else float(train_timesteps)
    times = [0.0, largest, *(largest * (index * _GOLDEN % 1) for index in range(1, TIMES - 1))]
    calls = [_call(model, [first], {**arguments, time: _filled(arguments[time], at)}) for at in times]
    swept = torch.stack([call[first.name][0] for call in calls]).to("cpu", torch.bfloat16)
    # what never changes needs no curve, and shows that this argument is not the time
    if not bool((swept != swept[0]).any()) or not bool(swept.isfinite().all()):
        return {}
    return {
        shared.name: swept.clone() for shared in alone if torch.equal(plain[shared.name], plain[first.name])
    }


def _call(model: nn.Module, inputs: Sequence[SharedInput], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """(entries, K) of every input that has one row an entry of the batch, by name."""
    seen: dict[str, Tensor] = {}
    called: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        called.add(name)
        if x.numel() == x.shape[0] * x.shape[-1]:
            seen[name] = x.reshape(x.shape[0], x.shape[-1]).clone()
        if len(called) == len(inputs):
            raise _Seen

    parameters = inspect.signature(model.forward).parameters
    rest = [name for name in arguments if parameters[name].kind is inspect.Parameter.VAR_KEYWORD]
    plain = {name: value for name, value in arguments.items() if name not in rest}
    for name in rest:
        plain |= cast("dict[str, Any]", arguments[name])
    layers = {shared.name: model.get_submodule(shared.layers[0]) for shared in inputs}
    with inputs_seen(layers, see), suppress(_Seen):
        model(**plain)
    return seen


def _perturbed(value: Any) -> Any:
    """Every floating-point number in it is another one, those that are 0 too."""
    match value:
        case Tensor() if value.is_floating_point():
            return value * _PERTURBED + 0.0625
        case dict():
            return {key: _perturbed(each) for key, each in cast("dict[Any, Any]", value).items()}
        case list():
            return [_perturbed(each) for each in cast("list[Any]", value)]
        case tuple() if type(value) is tuple:
            return tuple(_perturbed(each) for each in cast("tuple[Any, ...]", value))
        case float():
            return value * _PERTURBED
        case _:
            return value


def _filled(like: Any, at: float) -> Any:
    if isinstance(like, Tensor):
        return torch.full_like(like, at if like.is_floating_point() else round(at))
    return type(like)(at)


def _train_timesteps(pipe: DiffusionPipeline) -> int:
    config = getattr(getattr(pipe, "scheduler", None), "config", {})
    return int(config.get("num_train_timesteps") or 1000)
