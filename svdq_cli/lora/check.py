"""The self-check of a folded checkpoint: what was written is read again, and computes what it should."""

from __future__ import annotations

import torch
from torch import Tensor

from svdq_cli.checkpoint.check import structure_problems
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.errors import CheckFailedError
from svdq_cli.formats.contract import Branch
from svdq_cli.lora.edits import Edits
from svdq_cli.lora.join import JoinedBranches
from svdq_cli.lora.rewrite import is_changed_tensor, new_tensor
from svdq_cli.records import W4A4Plan

PROBES = 4  # random activations that a branch is tried on
# Folding only moves numbers: what is left is the order of float32 sums. Compression leaves out what it reports, on
# random activations by chance up to some times more.
MAX_MOVED_ERROR = 1e-3
MAX_OVER_REPORTED = 4.0
MAX_ROUNDING = 0.01  # of a merged 16-bit tensor; float16 and bfloat16 round to 0.1 % and 0.4 %


def require_folded(before: Checkpoint, after: Checkpoint, edits: Edits, joined: JoinedBranches) -> None:
    """CheckFailedError unless `after` is whole, and every changed layer is the old one plus its LoRAs."""
    wrong = [f"{problem.layer}: {problem.what}" for problem in structure_problems(after)]
    if not wrong:
        wrong = [*_wrong_branches(after, joined), *_wrong_tensors(before, after, edits)]
    if wrong:
        raise CheckFailedError(
            f"the self-check of the folded checkpoint failed: {wrong[0]}",
            hint="no output was written under the final name; please report this with the LoRA",
            where=wrong[0].split(":")[0],
        )


def _wrong_branches(after: Checkpoint, joined: JoinedBranches) -> list[str]:
    wrong: list[str] = []
    for layer in after.layers:
        if not isinstance(layer, W4A4Plan) or not joined.is_changed(layer.name):
            continue
        group = joined.groups[layer.name]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(PROBES, layer.linear.in_features, generator=generator, dtype=torch.float32)
        old = next(plan for plan in group if plan.name == layer.name)
        expected = _product(joined.checkpoint.branch(old), x)
        for addition in joined.added[group[0].name]:
            if (up := addition.ups.get(layer.name)) is not None:
                expected += _product(Branch(addition.down, up), x)
        error = float((_product(after.branch(layer), x) - expected).norm() / expected.norm().clamp(min=1e-30))
        reported = joined.layer_error.get(layer.name, 0.0)
        if not error <= MAX_MOVED_ERROR + MAX_ROUNDING * (reported > 0) + MAX_OVER_REPORTED * reported:
            wrong.append(f"{layer.name}: its branch is off by {error:.2g}")
    return wrong


def _wrong_tensors(before: Checkpoint, after: Checkpoint, edits: Edits) -> list[str]:
    wrong: list[str] = []
    for name in after.kept_names():
        if is_changed_tensor(name, edits):
            expected = new_tensor(before, name, edits)
            error = (after.kept_tensor(name).float() - expected).norm() / expected.norm().clamp(min=1e-30)
            if not float(error) <= MAX_ROUNDING:
                wrong.append(f"{name}: off by {float(error):.2g}")
    return wrong


def _product(branch: Branch, x: Tensor) -> Tensor:
    return x @ branch.down.float().T @ branch.up.float().T
