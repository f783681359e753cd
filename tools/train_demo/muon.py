"""Muon (Jordan et al. 2024) in float32: torch.optim.Muon iterates in bfloat16, which CPUs without AMX emulate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # Newton-Schulz coefficients of the Muon write-up
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """(B, N, K) to the nearest semi-orthogonal matrices, singular values roughly 1."""
    a, b, c = QUINTIC
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalized; steps have AdamW's size (Liu et al. 2025, section 2.2)."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.01) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            shapes.setdefault(parameter.shape, []).append(parameter)
        groups = [{"params": list(group)} for group in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            momenta = [self._momentum(parameter) for parameter in parameters]
            gradients = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            steps = orthogonalize(torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"])))
            size = 0.2 * max(parameters[0].shape) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(steps.unbind()), alpha=-group["lr"] * size)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]
