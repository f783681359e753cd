"""A model whose weights come block by block computes the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from svdq_cli.system.offload import WeightBudget, fill, weights_bytes
from tests.tiny import tiny_flux_transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return tiny_flux_transformer(double=2, single=2).eval().requires_grad_(False)


def _empty(model: nn.Module) -> nn.Module:
    """Parameters without memory, buffers as they are."""
    empty = copy.deepcopy(model)
    for module in empty.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    return empty


def _run(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    with torch.no_grad():
        return model(
            hidden_states=draw(1, 16, 16),
            encoder_hidden_states=draw(1, 8, 128),
            pooled_projections=draw(1, 128),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_an_offloaded_model_gives_the_same_bits(model: nn.Module, share: float):
    empty = _empty(model)
    room = int(weights_bytes(model) * share)
    fill(empty, model.state_dict(), device=CPU, room=WeightBudget(room, 0))
    resident = sum(parameter.nbytes for parameter in empty.parameters() if not parameter.is_meta)
    assert resident <= room
    assert resident == weights_bytes(model) if share == 1 else resident < weights_bytes(model)
    assert torch.equal(_run(empty), _run(model))
    assert sum(p.nbytes for p in empty.parameters() if not p.is_meta) == resident, "what was brought is gone"


def test_weights_are_read_only_when_their_block_runs(model: nn.Module):
    reads: list[str] = []

    class Reads(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().__getitem__(name)

    empty = _empty(model)
    fill(empty, Reads(model.state_dict()), device=CPU, room=WeightBudget(weights_bytes(model) // 2, 0))
    before = set(reads)
    reads.clear()
    _run(empty)
    assert before.isdisjoint(reads)
    assert before | set(reads) == set(model.state_dict())
    assert len(reads) == len(set(reads)), "once for each call"
