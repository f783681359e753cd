"""What a layer of a checkpoint computes, whatever it is stored as; and LoRAs of a realistic size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.records import W4A4Solution, W4A16Solution
from svdq_cli.runtime.linear import w4a4_exact, w4a16_rounded_weight
from tests.adapters.test_loras import RANK, Halves

# Layers of the tiny FLUX.1 that every kind of place is among: q, k, v of one input, single layers, the single block's
# split proj_out, a W4A16 modulation, and layers that stay at 16 bits
QKV = tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
SINGLE = "single_transformer_blocks.0"
FOUR_BIT = {
    **dict.fromkeys(QKV, (128, 128)),
    "transformer_blocks.0.attn.to_out.0": (128, 128),
    "transformer_blocks.0.ff.net.0.proj": (512, 128),
    "transformer_blocks.0.ff.net.2": (128, 512),
    "transformer_blocks.0.ff_context.net.2": (128, 512),
    f"{SINGLE}.attn.to_v": (128, 128),
    f"{SINGLE}.proj_mlp": (512, 128),
    f"{SINGLE}.proj_out": (128, 640),
}
MODULATION = {"transformer_blocks.0.norm1.linear": (768, 128)}
SIXTEEN_BIT = {"x_embedder": (128, 16), "proj_out": (16, 128)}


def small_lora(layers: dict[str, tuple[int, int]], *, seed: int = 0, rank: int = RANK) -> dict[str, Halves]:
    """By layer, (down, up) whose product is about a fifth of a weight of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Halves] = {}
    for name, (rows, columns) in layers.items():
        down = torch.randn(rank, columns, generator=generator) * columns**-0.5
        found[name] = down, torch.randn(rows, rank, generator=generator) * 0.2 * rank**-0.5
    return found


def probes(width: int) -> Tensor:
    """Activations (M, K) as a layer reads them."""
    return torch.randn(16, width, generator=torch.Generator().manual_seed(width)).bfloat16().float()


def layer_output(checkpoint: Checkpoint, name: str, x: Tensor) -> Tensor:
    """(M, N) float32, rounded nowhere but in what is stored."""
    plan = next((plan for plan in checkpoint.layers if plan.name == name), None)
    if plan is None:
        bias = f"{name}.bias"
        return F.linear(
            x,
            checkpoint.kept_tensor(f"{name}.weight").float().flatten(1),
            checkpoint.kept_tensor(bias).float() if bias in checkpoint.state else None,
        )
    solution = checkpoint.solution(plan)
    if isinstance(solution, W4A4Solution):
        return w4a4_exact(x, solution, unsigned_from=checkpoint.unsigned_from(plan))
    assert isinstance(solution, W4A16Solution)
    bias = None if solution.bias is None else solution.bias.float()
    return F.linear(x, w4a16_rounded_weight(solution), bias)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
