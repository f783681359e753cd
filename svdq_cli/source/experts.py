"""Stacked experts, taken apart: one linear layer for each expert.

Some mixtures of experts keep the weights of all experts in one parameter (E, K, N), so that no layer of the model is
a linear and nothing finds them. Everywhere in svdq such a model has linear layers instead, `experts.NAME.0`,
`experts.NAME.1` ..., each with the transposed slice (N, K) as its weight. The stacked tensor is met in two places
only: where a source is read, and where all of a stack stays at 16 bits in a file, which is then diffusers' own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from svdq_cli.source.model import Source
from svdq_cli.source.tensors import SliceTensor, TensorEntry

# Of diffusers' SwiGLUExperts: out = (silu(x gate) * (x up)) down, gate and up in one matrix
_CLASS = "SwiGLUExperts"
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_STACK = re.compile(rf"(.+\.)?experts\.({_GATE_UP}|{_DOWN})")
_EXPERT = re.compile(rf"({_STACK.pattern})\.(\d+)")


def is_expert(layer: str) -> bool:
    """Whether a layer is one expert of a stack, by its name."""
    return _EXPERT.fullmatch(layer) is not None


def stacks_of(tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The weights of experts among a model's tensors, in their order, by the name of diffusers' stacked tensor."""
    found: dict[str, dict[int, str]] = {}
    for name in tensors:
        if match := _EXPERT.fullmatch(name.removesuffix(".weight")):
            found.setdefault(match[1], {})[int(match[match.lastindex or 0])] = name
    return {stack: tuple(weights[number] for number in sorted(weights)) for stack, weights in found.items()}


def with_single_experts(source: Source) -> Source:
    """The source with a matrix (N, K) for each expert of a stack (E, K, N); the source itself where it has none."""
    if not any(_is_stack(name, entry) for name, entry in source.tensors.items()):
        return source
    tensors: dict[str, TensorEntry] = {}
    for name, entry in source.tensors.items():
        if _is_stack(name, entry):
            tensors |= {f"{name}.{n}.weight": SliceTensor(entry, n) for n in range(entry.shape[0])}
        else:
            tensors[name] = entry
    return replace(source, tensors=tensors)


def _is_stack(name: str, entry: TensorEntry) -> bool:
    return len(entry.shape) == 3 and _STACK.fullmatch(name) is not None


def take_experts_apart(model: nn.Module) -> None:
    """Put linear layers in the place of stacked experts. For models on the meta device: weights get shapes, not
    numbers."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ == _CLASS:
            model.set_submodule(name, SingleExperts(module))


class SingleExperts(nn.Module):
    """diffusers' SwiGLUExperts with a linear layer for each expert."""

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = _linears(stacked.get_parameter(_GATE_UP))
        self.down_proj = _linears(stacked.get_parameter(_DOWN))

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """x (M, K): rows sorted by expert, of which each has its number. Rows beyond them are padding and give zeros.
        Returns (M, K)."""
        counts: list[int] = num_tokens_per_expert.tolist()
        parts = x[: sum(counts)].split(counts)
        outputs = [self._expert(number, part) for number, part in enumerate(parts) if len(part)]
        return torch.cat([*outputs, x.new_zeros(len(x) - sum(counts), x.shape[-1])])

    def _expert(self, number: int, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj[number](x).chunk(2, dim=-1)
        return self.down_proj[number](functional.silu(gate) * up)


def _linears(stack: nn.Parameter) -> nn.ModuleList:
    count, columns, rows = stack.shape
    return nn.ModuleList(
        nn.Linear(columns, rows, bias=False, device="meta", dtype=stack.dtype) for _ in range(count)
    )
