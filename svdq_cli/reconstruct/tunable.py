"""Converted linears whose 16-bit numbers can be tuned by gradient; the 4-bit codes stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svdq_cli.records import Int4, SharedInput, W4A4Solution
from svdq_cli.solve.quantizers import QuantizedWeight, dequantize_weight, fake_quantize_activation
from svdq_cli.solve.smoothing import SMOOTH_RANGE, invertible


class Tunable(nn.Module):
    """One linear in float32. `log_smooth` and `down` may be shared with other layers of its input.

    Codes are fixed, so a change of the smoothing factor also changes the weight that they represent.
    """

    def __init__(self, solution: W4A4Solution, log_smooth: nn.Parameter, down: nn.Parameter) -> None:
        super().__init__()
        self.solution = solution
        self.log_smooth, self.down = log_smooth, down
        self.up = nn.Parameter(solution.up.float())
        self.bias = None if solution.bias is None else nn.Parameter(solution.bias.float())
        # e4m3 micro scales are too coarse to be nudged
        tuned = isinstance(solution.plan.precision, Int4)
        self.scales = nn.Parameter(solution.scales.float()) if tuned else None
        self.weight = _weight(solution, unscaled=tuned)

    def take(self, solution: W4A4Solution) -> None:
        """The codes again, of the layer as it was solved."""
        self.weight = _weight(solution, unscaled=self.scales is not None)

    def drop(self) -> None:
        """Without its codes the layer can't run until it takes them again; what is tuned stays."""
        self.weight = self.weight.new_empty(0)
        self.solution = replace(self.solution, codes=self.solution.codes.new_empty(0))

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows = input.reshape(-1, input.shape[-1]).float()
        # kept for the gradient: what is multiplied; what is between is made again, which costs less than its memory
        quantized = checkpoint(self._quantized, rows, use_reentrant=False, preserve_rng_state=False)
        weight = self.weight
        if self.scales is not None:
            weight = (
                weight.unflatten(1, (-1, self.solution.plan.precision.group)) * self.scales.unsqueeze(2)
            ).flatten(1)
        y = quantized @ weight.T + rows @ self.down.T @ self.up.T
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*input.shape[:-1], -1).to(input.dtype)

    def _quantized(self, rows: Tensor) -> Tensor:
        """Smoothed and rounded. Rounding passes the gradient straight through; the scale, a group's peak over 7 or 6,
        has its own (LSQ, arXiv 1902.08153)."""
        precision = self.solution.plan.precision
        smoothed = rows / self.log_smooth.exp()
        groups = smoothed.unflatten(1, (-1, precision.group))
        peak = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        with torch.no_grad():
            rounded = fake_quantize_activation(smoothed, precision).unflatten(1, (-1, precision.group))
            share = (rounded - groups) / peak
        return (groups + share * peak).flatten(1)

    def rounded(self, smooth: Tensor, down: Tensor) -> W4A4Solution:
        """What would be stored, with the input's common `smooth` and `down` in their stored dtype. They are (K,) and
        (R, K). Without codes, if those are dropped."""
        old = self.solution
        return replace(
            old,
            smooth=smooth,
            down=down,
            up=self.up.detach().to(old.up.dtype),
            bias=None if self.bias is None else self.bias.detach().to(old.up.dtype),
            scales=old.scales if self.scales is None else _nonzero(self.scales.detach()).to(old.scales.dtype),
        )


def _weight(solution: W4A4Solution, *, unscaled: bool) -> Tensor:
    """(N, K) in float32, of an `unscaled` one the codes alone."""
    scales = torch.ones_like(solution.scales) if unscaled else solution.scales
    return dequantize_weight(QuantizedWeight(solution.codes, scales, solution.outer), solution.plan.precision)


def _nonzero(scales: Tensor) -> Tensor:
    """Scales (N, K/G) of either sign; 1 for one that tuning has brought to 0, where its group would be lost."""
    return torch.where(scales.abs() < 1e-30, torch.ones_like(scales), scales)


class TunableBlock:
    """The tunable linears of one block, with the parameters that layers of one input share."""

    def __init__(self, inputs: Iterable[SharedInput], solutions: Mapping[str, W4A4Solution]) -> None:
        self.layers: dict[str, Tunable] = {}
        self._groups: list[tuple[nn.Parameter, list[tuple[nn.Parameter, list[str]]]]] = []
        for shared in inputs:
            members = [name for name in shared.layers if name in solutions]
            if not members:
                continue
            log_smooth = nn.Parameter(solutions[members[0]].smooth.float().log())
            branches: list[tuple[nn.Parameter, list[str]]] = []
            for part in shared.branches:
                names = [name for name in part if name in solutions]
                if not names:
                    continue
                down = nn.Parameter(solutions[names[0]].down.float())
                branches.append((down, names))
                for name in names:
                    self.layers[name] = Tunable(solutions[name], log_smooth, down)
            self._groups.append((log_smooth, branches))

    def parameters(self) -> list[nn.Parameter]:
        found = {id(p): p for layer in self.layers.values() for p in layer.parameters()}
        return list(found.values())

    @torch.no_grad()
    def settle(self) -> None:
        """Every parameter becomes what would be stored of it."""
        for name, stored in self.rounded().items():
            layer = self.layers[name]
            layer.log_smooth.copy_(stored.smooth.float().log())
            layer.down.copy_(stored.down)
            layer.up.copy_(stored.up)
            if layer.bias is not None and stored.bias is not None:
                layer.bias.copy_(stored.bias)
            if layer.scales is not None:
                layer.scales.copy_(stored.scales)

    def rounded(self) -> dict[str, W4A4Solution]:
        """All layers as they would be stored."""
        stored: dict[str, W4A4Solution] = {}
        for log_smooth, branches in self._groups:
            for down, names in branches:
                dtype = self.layers[names[0]].solution.up.dtype
                smooth = log_smooth.detach().exp().clamp(*SMOOTH_RANGE).to(dtype)
                if self.layers[names[0]].solution.plan.branchless:
                    smooth = invertible(smooth, dtype)
                for name in names:
                    stored[name] = self.layers[name].rounded(smooth, down.detach().to(dtype))
        return stored


def frozen(solution: W4A4Solution) -> Tunable:
    """The layer as it is stored, for running."""
    layer = Tunable(
        solution, nn.Parameter(solution.smooth.float().log()), nn.Parameter(solution.down.float())
    )
    return layer.requires_grad_(False)
