"""A text encoder run block by block: one call of the whole model, with one block's weights in memory at a time.

What the blocks pass to each other (masks, position tables, caches) is the model's own business: its forward method runs
as it is, and every block's forward is replaced by one that brings the weights, lets a visitor run the block as often as
it likes, and drops them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdq_cli.conversion.read_weights import require_finite
from svdq_cli.errors import InputError
from svdq_cli.pipelines.encoder_calls import EncoderCall
from svdq_cli.source import TensorEntry

# (path of the block, the block, what runs it as the model asked for) -> what the model gets of it
Visit = Callable[[str, nn.Module, Callable[[], Any]], Any]


def run_by_block(
    model: Any,
    blocks: Sequence[str],
    weights: Callable[[str], Tensor],
    call: EncoderCall,
    visit: Visit,
    *,
    device: torch.device,
) -> None:
    """One forward pass of an empty `model`. `weights`: a parameter by its own name. `blocks`: paths, each visited once.

    Parts that are neither in a block nor needed for text (towers for images) stay empty, unless the call has images.
    """
    _without_cache(model)
    if (head := model.get_output_embeddings()) is not None and head is not model.get_input_embeddings():
        _replace(model, head, nn.Identity())  # logits of every token of every prompt, which nobody reads
    model.tie_weights()  # what is tied has one name below
    inside = tuple(f"{block}." for block in blocks)
    used = _used_outside(model, inside, images=call.has_images)
    _fill(model, used, weights, device)
    model.tie_weights()
    for buffered in model.modules():
        for name, buffer in buffered.named_buffers(recurse=False):
            setattr(buffered, name, buffer.to(device))
    for path in blocks:
        block = model.get_submodule(path)
        block.forward = partial(_visited, path, block, block.forward, weights, visit, device)
    arguments = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in call.arguments.items()
    }
    with torch.no_grad():
        model(**arguments)


def _visited(
    path: str,
    block: nn.Module,
    forward: Callable[..., Any],
    weights: Callable[[str], Tensor],
    visit: Visit,
    device: torch.device,
    *args: Any,
    **kwargs: Any,
) -> Any:
    names = [f"{path}.{name}" for name, _ in block.named_parameters()]
    _fill_module(block, path, names, weights, device)
    try:
        return visit(path, block, lambda: forward(*args, **kwargs))
    finally:
        block.to("meta")


def _used_outside(model: Any, inside: tuple[str, ...], *, images: bool) -> list[str]:
    """Parameters that a call needs outside the blocks: all of the models that the blocks are in, and no other's but for
    those of images."""
    from transformers import PreTrainedModel

    others = [
        f"{path}."
        for path, module in model.named_modules()
        if path
        and not images
        and isinstance(module, PreTrainedModel)
        and not inside[0].startswith(f"{path}.")
    ]
    return [
        name
        for name, _ in model.named_parameters()
        if not name.startswith(inside) and not name.startswith(tuple(others))
    ]


def _fill(
    model: nn.Module, names: Iterable[str], weights: Callable[[str], Tensor], device: torch.device
) -> None:
    _fill_module(model, "", names, weights, device)


def _fill_module(
    module: nn.Module, path: str, names: Iterable[str], weights: Callable[[str], Tensor], device: torch.device
) -> None:
    for name in names:
        owner, _, last = name.removeprefix(f"{path}." if path else "").rpartition(".")
        value = nn.Parameter(weights(name).to(device), requires_grad=False)
        module.get_submodule(owner).register_parameter(last, value)


def _without_cache(model: Any) -> None:
    """Blocks run more than once, and a cache of keys and values would take in each time."""
    for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    path = next(path for path, module in model.named_modules() if module is old)
    model.set_submodule(path, new)


def own_weights(
    tensors: Mapping[str, TensorEntry], parameters: Mapping[str, str], *, dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """Reads a parameter by the model's own name, in `dtype`. InputError for one that the files lack, or that is not
    finite."""
    stored = {own: name for name, own in parameters.items()}

    def read(own: str) -> Tensor:
        name = stored.get(own)
        if name is None:
            raise InputError(
                f"{own} is missing from the weights", hint="download the folder again", where=own
            )
        return require_finite(tensors[name].read(), name, tensors[name]).to(dtype)

    return read
