"""Where a model's weights are stored while it runs: on the device as far as they fit, else brought there block by
block.

The hooks are accelerate's; which blocks stay is its choice too. Numbers do not depend on where weights come from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_HOOK = "_hf_hook"  # where accelerate keeps a module's hook


@dataclass(frozen=True, slots=True)
class WeightBudget:
    """Bytes that weights may take: on the device that computes and, behind a GPU, in host memory.

    What fits in neither is read from `weights` each time its block runs.
    """

    device: int
    host: int

    def share(self, part: float) -> WeightBudget:
        """That fraction of both budgets."""
        return WeightBudget(int(self.device * part), int(self.host * part))


class _Kept(Mapping[str, Tensor]):
    """`weights`, those of some modules read once and kept in host memory."""

    def __init__(self, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        self._weights, self._kept = weights, kept

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name] if name in self._kept else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], *, device: torch.device, room: WeightBudget
) -> None:
    """Gives an empty model (parameters on the meta device, in their final dtype) its weights.

    `weights`: every tensor of the state dict, each read when it is asked for. Blocks that do not fit in `room` get
    hooks that bring their weights to `device` when they run. Raises OutOfResourcesError if not one block has room.
    """
    places = _places(model, device, room)
    here = {name for name in weights if _place(name, places) == "device"}
    parameters = dict(model.named_parameters())
    here |= {name for name in weights if name not in parameters}  # buffers are small and stay
    for name in here:
        model.load_state_dict({name: weights[name].to(device)}, strict=False, assign=True)
    if len(here) == len(weights):
        model.to(device)  # buffers that no file holds
        return
    kept = {name: weights[name] for name in weights if _place(name, places) == "host" and name not in here}
    if device.type == "cuda":
        kept = {name: tensor.pin_memory() for name, tensor in kept.items()}
    _attach(model, _Kept(weights, kept), places, device)


def fill_beside(
    model: nn.Module, blocks: Iterable[str], weights: Mapping[str, Tensor], *, device: torch.device
) -> None:
    """Gives an empty model the weights outside `blocks` (paths), which stay empty."""
    heads = tuple(f"{block}." for block in blocks)
    for name in weights:
        if not name.startswith(heads):
            model.load_state_dict({name: weights[name].to(device)}, strict=False, assign=True)
    for path, module in model.named_modules():
        if not f"{path}.".startswith(heads):
            _move_buffers(module, device)


def filled_copy(
    model: nn.Module, block: str, weights: Mapping[str, Tensor], *, device: torch.device
) -> nn.Module:
    """A copy of one of the model's blocks with its weights, on the device."""
    return filled_block(deepcopy(model.get_submodule(block)), block, weights, device=device)


def filled_block(
    module: nn.Module,
    block: str,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device,
    without: Collection[str] = (),
) -> nn.Module:
    """`module`, a copy of the model's `block`, with its weights, on the device. `without`: modules in it (paths from
    the block on) that stay as they are."""
    others = tuple(f"{path}." for path in without)
    own = {
        name: weights[f"{block}.{name}"].to(device)
        for name in module.state_dict()
        if not name.startswith(others)
    }
    module.load_state_dict(own, assign=True, strict=not without)
    for each in module.modules():
        _move_buffers(each, device)
    return module.requires_grad_(False)


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of accelerate's brings the module's weights when it is called."""
    return hasattr(module, _HOOK)


@contextmanager
def brought(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules' weights are available in the block, which uses them without a call: hooks do as they do around
    one."""
    hooked = [(module, getattr(module, _HOOK)) for module in modules if is_hooked(module)]
    with ExitStack() as stack:
        for module, hook in hooked:
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move a module's buffers to the device, also those that no file holds."""
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


def weights_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _attach(
    model: nn.Module, weights: Mapping[str, Tensor], places: Mapping[str, str], device: torch.device
) -> None:
    from accelerate.hooks import attach_align_device_hook_on_blocks

    attach_align_device_hook_on_blocks(
        model,
        execution_device={"": device, **dict.fromkeys(places, device)},
        offload={module: place != "device" for module, place in places.items()},
        weights_map=weights,
    )


def _places(model: nn.Module, device: torch.device, room: WeightBudget) -> dict[str, str]:
    """Module path -> "device", "host" or "disk", for modules that cover the model. Blocks are not torn apart."""
    if weights_bytes(model) <= room.device:
        return {"": "device"}
    from accelerate.utils import infer_auto_device_map

    gpu = device.type == "cuda"
    main = (device.index or 0) if gpu else "cpu"
    limits: dict[int | str, int | str] = {main: room.device, **({"cpu": room.host} if gpu else {})}
    blocks = getattr(model, "_no_split_modules", None) or []
    found = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=blocks)
    words = {main: "device", "cpu": "host" if gpu else "device", "disk": "disk"}
    # accelerate's hooks bring modules, not parameters that are stored next to them in a module that is torn apart
    alone = {name for name, _ in model.named_parameters()}
    return {name: "device" if name in alone else words[place] for name, place in found.items()}


def _place(name: str, places: Mapping[str, str]) -> str:
    """The place of the nearest module above a tensor."""
    path = name
    while path not in places and path:
        path = path.rpartition(".")[0]
    return places[path]
