"""What calibrated rounding of a large text encoder takes, and whether `--max-ram` holds. By hand; minutes a block:

    python -m tools.encoder_memory t5 --blocks 5 --max-ram 8GB

Encoders with random weights and blocks of the size of T5-XXL's (FLUX.1, SD 3) or Qwen2.5-VL-7B's (Qwen-Image), as many
as `--blocks` says: memory does not depend on their number, but for the weights on the disk. Prints what the plan
predicts without a limit, the limit, how many tokens of calibration it leaves, and the process's peak.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from svdq_cli.checkpoint.text_encoders import plan_encoder
from svdq_cli.conversion.encoder_weights import budget_of, calibration_bytes, write_encoder
from svdq_cli.conversion.memory import free_ram
from svdq_cli.pipelines.encoder_calls import EncoderCall
from svdq_cli.prepare.options import RunOptions
from svdq_cli.storage.tensor_file import TensorSpec, write_tensors
from svdq_cli.system.allocator import free_tensors_at_once, keep_freed_memory
from svdq_cli.system.machine import peak_memory
from svdq_cli.text import bytes_of_size

PROMPTS, TOKENS = 64, 128


def t5(blocks: int) -> Any:
    """The encoder of T5-XXL with fewer blocks."""
    config = transformers.T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=blocks, num_heads=64, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel._from_config, config


def qwen(blocks: int) -> Any:
    """Qwen2.5's language model of 7 B parameters with fewer blocks and words."""
    config = transformers.Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=blocks,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=32768,
    )
    return transformers.Qwen2Model._from_config, config


SHAPES = {"t5": t5, "qwen": qwen}


def written(shape: str, blocks: int, folder: Path) -> int:
    """Writes the encoder, one tensor after the other. Returns how many parameters it has."""
    make, config = SHAPES[shape](blocks)
    with torch.device("meta"):
        model = make(config)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    specs = {
        name: TensorSpec(tuple(tensor.shape), torch.bfloat16)
        for name, tensor in model.named_parameters(remove_duplicate=True)
    }
    seeded = torch.Generator().manual_seed(0)
    with write_tensors(folder / "model.safetensors", specs, {"format": "pt"}) as writer:
        for name, spec in specs.items():
            size = spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 0.0
            tensor = torch.randn(spec.shape, generator=seeded) * size + (not size)
            writer.write(name, tensor.bfloat16())
    return sum(torch.Size(spec.shape).numel() for spec in specs.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="What calibrated rounding of a large text encoder takes")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--max-ram")
    said = parser.parse_args()
    limit = None if said.max_ram is None else bytes_of_size(said.max_ram)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "encoder"
        folder.mkdir()
        count = written(said.shape, said.blocks, folder)
        base = peak_memory().ram_bytes
        (keep_freed_memory if limit is None else free_tensors_at_once)()
        plan = plan_encoder(folder, "text_encoder", dtype=torch.bfloat16)
        budget = budget_of(plan, free_ram(RunOptions(max_ram=limit)))
        print(
            f"{said.shape}: {count / 1e9:.2f} B parameters, {said.blocks} blocks; {base / 1e9:.2f} GB before"
        )
        print(
            f"predicted without a limit: {calibration_bytes(plan) / 1e9:.2f} GB; limit: {said.max_ram}; {budget}"
        )
        if budget is None:
            return 1
        ids = torch.randint(0, 30_000, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(1))
        started = time.monotonic()
        figures = write_encoder(
            Path(place) / "out.safetensors",
            plan,
            EncoderCall({"input_ids": ids}),
            device=torch.device("cpu"),
            budget=budget,
        )
    peak = peak_memory().ram_bytes
    print(
        f"peak {peak / 1e9:.2f} GB, {time.monotonic() - started:.0f} s, hidden states of held-out prompts "
        f"{', '.join(f'{each:.1f}' for each in figures.hidden)} dB"
    )
    return 0 if limit is None or peak <= limit else 1


if __name__ == "__main__":
    raise SystemExit(main())
