"""One block tuned against what it makes of the same calls in the 16-bit model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdq_cli.reconstruct.calls import tensors_of
from svdq_cli.reconstruct.objective import signals_of, trajectory_error
from svdq_cli.reconstruct.swap_modules import put_for_now
from svdq_cli.reconstruct.tensor_cache import Kept
from svdq_cli.reconstruct.tunable import TunableBlock, frozen
from svdq_cli.records import SharedInput, W4A4Solution
from svdq_cli.reports import BlockSearch

STEPS = 150
CALLS_PER_STEP = 3  # of one trajectory: enough pairs to see what stays from step to step
JUDGE_EVERY = 30  # steps between two looks at the held-out trajectories
LEARNING_RATE = 2e-3  # a step's size relative to a parameter's RMS
HELD_OUT = 4  # one trajectory in four judges: the last ones, which are of other images


@dataclass(frozen=True, slots=True, eq=False)
class BlockIO:
    """What a block is given in one call of the 4-bit model (args, kwargs), and what it returns in the 16-bit one."""

    given: Kept
    wanted: Kept


@dataclass(frozen=True, slots=True, eq=False)
class BlockIOs:
    """A block's part of one trajectory."""

    of: tuple[BlockIO, ...]
    length: int  # of the whole trajectory


def tune_block(
    model: nn.Module,
    block: str,
    inputs: Sequence[SharedInput],
    solutions: Mapping[str, W4A4Solution],
    passages: Sequence[BlockIOs],
    *,
    device: torch.device,
    seed: int,
) -> tuple[dict[str, W4A4Solution], BlockSearch]:
    """Better solutions, or the same ones where held-out trajectories say that none is.

    `model` needs no weights but those of `block`, which are on `device`, with its layers converted. `inputs` and
    `solutions`: of the layers to tune. `passages`: in the order of images.
    """
    module = model.get_submodule(block)
    cut = len(passages) - max(1, len(passages) // HELD_OUT)
    train, judge = passages[:cut], passages[cut:]
    signals = signals_of(tensors_of(p.wanted.on(device)) for each in passages for p in each.of)

    def error(passages: Sequence[BlockIO], length: int) -> Tensor:
        return trajectory_error([_lost(module, block_io, device) for block_io in passages], signals, length)

    @torch.no_grad()
    def judged(found: Mapping[str, W4A4Solution]) -> float:
        with put_for_now(model, {name: frozen(solution) for name, solution in found.items()}):
            return sum(float(error(each.of, each.length)) for each in judge) / len(judge)

    before = least = judged(solutions)
    best: dict[str, W4A4Solution] = dict(solutions)
    if not train or not solutions:
        return best, BlockSearch(before, before)
    tunable = TunableBlock(inputs, solutions)
    optimizer = _optimizer(tunable)
    order = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * (1 - 0.9 * step / STEPS)
        each = train[int(torch.randint(len(train), (1,), generator=order))]
        some = torch.randperm(len(each.of), generator=order)[:CALLS_PER_STEP].tolist()
        with put_for_now(model, tunable.layers), torch.enable_grad():
            loss = error([each.of[index] for index in some], each.length)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        if (step + 1) % JUDGE_EVERY == 0:
            stored = tunable.rounded()
            if (reached := judged(stored)) < least:
                best, least = stored, reached
    return best, BlockSearch(before, least)


def _optimizer(tunable: TunableBlock) -> torch.optim.Optimizer:
    rates = [(parameter, LEARNING_RATE * _size(parameter)) for parameter in tunable.parameters()]
    return torch.optim.Adam([{"params": [parameter], "lr": rate, "full": rate} for parameter, rate in rates])


def _size(parameter: nn.Parameter) -> float:
    """A parameter's RMS; of a smoothing factor, that of its logarithm."""
    return max(float(parameter.detach().float().square().mean().sqrt()), 1e-4)


def _lost(block: nn.Module, block_io: BlockIO, device: torch.device) -> tuple[Tensor, ...]:
    """What the block's outputs are off by."""
    args, kwargs = block_io.given.on(device)
    found = tensors_of(block(*args, **kwargs))
    wanted = tensors_of(block_io.wanted.on(device))
    return tuple(out.float() - exact.float() for out, exact in zip(found, wanted, strict=True))
