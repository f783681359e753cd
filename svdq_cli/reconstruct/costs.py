"""What tuning a model costs, and going through its blocks: operations by kind, and the memory alive at the peak.

Counts follow `tuning`, `tunable_model` and `run`; T tokens of a call, N, K, R as everywhere. Tests hold the
memory against what torch allocates.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from svdq_cli.reconstruct.tuning import CALLS_PER_STEP, HELD_OUT, JUDGE_EVERY, STEPS
from svdq_cli.records import LayerPlan, W4A4Plan
from svdq_cli.solve.work import Work


@dataclass(frozen=True, slots=True)
class BlockSize:
    """One block, and what runs through it in one recorded call."""

    layers: tuple[tuple[LayerPlan, int], ...]  # that are quantized, and how many tokens each reads
    kept: int  # weights of the block that stay as they are
    tokens: int  # of all streams
    width: int  # of a token between blocks
    images: int  # that the tokens are of

    @property
    def w4a4(self) -> list[tuple[W4A4Plan, int]]:
        return [(plan, tokens) for plan, tokens in self.layers if isinstance(plan, W4A4Plan)]

    @property
    def weights(self) -> int:
        """Bytes of the quantized layers' weights."""
        return sum(plan.linear.in_features * plan.linear.out_features for plan, _ in self.layers)

    def passed_bytes(self, itemsize: int) -> int:
        """Bytes of a block's inputs, or of its outputs, in one call."""
        return itemsize * self.tokens * self.width


@dataclass(frozen=True, slots=True)
class CallCounts:
    """How many calls of the model were recorded."""

    trajectories: int
    each: int  # calls of a trajectory

    @property
    def all(self) -> int:
        return self.trajectories * self.each

    @property
    def held_out(self) -> int:
        return max(1, self.trajectories // HELD_OUT) * self.each

    @property
    def per_step(self) -> int:
        return min(CALLS_PER_STEP, self.each)


def passing_work(size: BlockSize, calls: CallCounts) -> Work:
    """The 4-bit model's hidden states through a block."""
    return _forward(size) * calls.all


def tuning_work(size: BlockSize, calls: CallCounts) -> Work:
    """A block's part of tuning the model: forward, and once more where gradients come back."""
    if calls.trajectories < 2:
        return _forward(size) * calls.held_out
    judged = calls.held_out * (1 + math.ceil(STEPS / JUDGE_EVERY))
    forward, trained = _forward(size), _forward(size, gradients=True)
    return forward * judged + (forward + trained) * (STEPS * calls.per_step)


def _forward(size: BlockSize, *, gradients: bool = False) -> Work:
    """One call through the block. Gradients take two products for each one, and what is between products twice."""
    total = Work(matmul=4 * size.tokens**2 / size.images * size.width, calls=100)  # attention
    for plan, tokens in size.w4a4:
        n, k = plan.linear.out_features, plan.linear.in_features
        products = 2 * tokens * (n * k + plan.rank * (n + k))
        total += Work(matmul=products, quantized=tokens * k + n * k, calls=60)
    if not gradients:
        return total
    return total * 3 + Work(
        quantized=sum(tokens * plan.linear.in_features for plan, tokens in size.w4a4),
        calls=120 * len(size.w4a4),
    )


def tuning_bytes(sizes: Collection[BlockSize], calls: CallCounts, *, itemsize: int) -> int:
    """Bytes on the device that are alive at the peak while the model of these blocks is tuned. `itemsize`: of the
    16-bit model's weights."""
    numbers = sum(_parameter_bytes(plan) for size in sizes for plan, _ in size.w4a4)
    handed_on = calls.per_step * sum(size.passed_bytes(itemsize) for size in sizes)
    return numbers + handed_on + max((_trained_bytes(size, itemsize) for size in sizes), default=0)


def _trained_bytes(size: BlockSize, itemsize: int) -> int:
    """A block as gradients reach it in one call: its weights, and what it computed once more."""
    weights = [plan.linear.in_features * plan.linear.out_features for plan, _ in size.w4a4]
    # codes as they are read, and in float32; the scaled weights; of one layer at a time their gradient
    held = itemsize * size.kept + 5 * size.weights + 4 * sum(weights) + 8 * max(weights, default=0)
    return held + _saved_bytes(size, itemsize) + 6 * 4 * size.tokens * size.width


def passing_bytes(size: BlockSize, itemsize: int) -> int:
    """Bytes on the device while the hidden states go through a block: the block at 16 bits, its codes and their
    float32 numbers, and the widest layer at work."""
    widest = max(
        tokens * (plan.linear.in_features + plan.linear.out_features) for plan, tokens in size.layers
    )
    branches = sum(
        4 * plan.rank * (plan.linear.in_features + plan.linear.out_features) for plan, _ in size.w4a4
    )
    weights = itemsize * (size.kept + size.weights) + 5 * size.weights + branches
    return weights + 12 * widest + 3 * size.passed_bytes(itemsize)


def _parameter_bytes(plan: W4A4Plan) -> int:
    """What is tuned, with its gradient, Adam's two moments and the best so far, in float32."""
    n, k = plan.linear.out_features, plan.linear.in_features
    return 5 * 4 * (n * k // plan.precision.group + plan.rank * (n + k) + n + k)


def _saved_bytes(size: BlockSize, itemsize: int) -> int:
    """What one call keeps for its gradients: of every layer its input, as it came and quantized; behind it its output
    and what norms, rotary embeddings, attention and activations keep of it."""
    return sum(
        tokens * (8 * plan.linear.in_features + 4 * itemsize * plan.linear.out_features)
        for plan, tokens in size.w4a4
    )
