"""How much each layer's noise matters to what the model puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdq_cli.reconstruct.calls import Call, tensors_of


def output_gains(
    model: nn.Module, layers: Sequence[str], calls: Sequence[Call], *, seed: int
) -> dict[str, float]:
    """Noise over signal at the model's output, by layer, for a layer whose own noise is as strong as its signal.

    Ours. With J the model's Jacobian for a layer's output y, white noise of power p on every element of y becomes noise
    of power p |J|_F^2 at the output; |J|_F^2 is the mean of |J^T v|^2 over random v (Hutchinson 1989), which costs one
    backward pass a call. Layers whose output is discarded have a gain of 0. `model` is left as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    total = dict.fromkeys(layers, 0.0)
    for call in calls:
        with _watched(model, layers, total), torch.enable_grad():
            outputs = [out for out in tensors_of(model(*call.args, **call.kwargs)) if out.requires_grad]
            power = sum(float(out.detach().float().square().sum()) for out in outputs)
            probe = sum((out.float() * _normal(out, generator)).sum() for out in outputs)
            assert isinstance(probe, Tensor)
            # the probe's scale makes every |J^T v|^2 relative to the output's power
            (probe / max(power, 1e-30) ** 0.5).backward()
    return {name: gain / len(calls) for name, gain in total.items()}


@contextmanager
def _watched(model: nn.Module, layers: Sequence[str], total: dict[str, float]) -> Iterator[None]:
    """Adds each layer's signal power times the power of the gradient at its output to `total`."""

    def watch(name: str, output: Tensor) -> Tensor:
        signal = float(output.detach().float().square().mean())

        def add(gradient: Tensor) -> None:
            total[name] += signal * float(gradient.float().square().sum())

        if not output.requires_grad:  # the first layers: no parameter before them asks for gradients
            output = output.detach().requires_grad_(True)
        output.register_hook(add)
        return output

    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)

    def hook_of(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, inputs, output: watch(name, output)

    handles = [model.get_submodule(name).register_forward_hook(hook_of(name)) for name in layers]
    try:
        with _recomputed(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(asked[name])


@contextmanager
def _recomputed(model: nn.Module) -> Iterator[None]:
    """Activations between blocks are kept and those inside recomputed, where the model can: a backward pass through a
    12B model then fits next to its weights."""
    switch: Any = model
    can = (
        bool(getattr(model, "_supports_gradient_checkpointing", False))
        and not switch.is_gradient_checkpointing
    )
    if can:
        switch.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if can:
            switch.disable_gradient_checkpointing()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device)
