"""What folding a LoRA into a checkpoint of FLUX.1-dev's size takes. By hand, with 15 GB of disk:

    python -m tools.fold_full_size FOLDER [--rank 32] [--format nunchaku-lite]

The checkpoint has the true names, shapes and bytes (6.8 GB at rank 32) and random numbers; the LoRA adapts every W4A4
layer. Prints the report's seconds and peak memory. The checkpoint is kept for the next run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.checkpoint.file_layout import kept_shapes
from svdq_cli.checkpoint.writer import WEIGHT_FILE, Target, target_of
from svdq_cli.formats import format_named
from svdq_cli.formats.headers import CONFIG, RANKS, as_text
from svdq_cli.lora.fold import fold
from svdq_cli.prepare.options import RunOptions
from svdq_cli.records import Int4, ModelPlan
from svdq_cli.storage.tensor_file import TensorSpec, write_tensors
from tests.full_size import FLUX_DEV, full_size_plan

GENERATOR = torch.Generator().manual_seed(0)


def random_tensor(spec: TensorSpec) -> Tensor:
    """Finite and not zero. One row of random numbers, repeated: drawing them all would take the most time."""
    row = spec.shape[-1] if spec.shape else 1
    if spec.dtype.is_floating_point:
        values = (torch.rand(row, generator=GENERATOR) * 0.02 + 0.001).to(spec.dtype)
    else:
        values = torch.randint(-100, 100, (row,), generator=GENERATOR).to(spec.dtype)
    return values.expand(spec.shape).contiguous()


def full_size_checkpoint(folder: Path, name: str) -> Path:
    """FLUX.1-dev's size in a format, as a component folder or a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    fmt = format_named(name)
    plan, inventory = full_size_plan(folder, FLUX_DEV, fmt, Int4())
    target = target_of(fmt, plan, inventory.state, torch.bfloat16)
    specs = {
        f"{module.name}.{suffix}": TensorSpec(spec.shape, spec.dtype)
        for module in target.file.modules
        for suffix, spec in fmt.tensor_specs(module.plan, torch.bfloat16, module.traits).items()
    }
    for tensor, shape in kept_shapes(target.file, inventory.state).items():
        specs[tensor] = TensorSpec(shape, torch.bfloat16)
    path = folder / f"{name}.safetensors" if fmt.single_file else folder / name / WEIGHT_FILE
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        with write_tensors(path, specs, metadata_of(target, plan)) as writer:
            for tensor, spec in specs.items():
                writer.write(tensor, random_tensor(spec))
    if fmt.single_file:
        return path
    config = {**FLUX_DEV, "quantization_config": target.metadata()}
    (path.parent / "config.json").write_text(json.dumps(config))
    return path.parent


def metadata_of(target: Target, plan: ModelPlan) -> dict[str, str]:
    if not target.format.single_file:
        return {"format": "pt"}
    ranks = {layer.name: layer.rank for layer in plan.w4a4}
    return as_text({**target.metadata(), CONFIG: FLUX_DEV, RANKS: ranks})


def full_size_lora(path: Path, plan: ModelPlan, rank: int) -> Path:
    """A LoRA on every W4A4 layer, bfloat16."""
    tensors: dict[str, Tensor] = {}
    for layer in plan.w4a4:
        rows, columns = layer.linear.out_features, layer.linear.in_features
        down = torch.randn(rank, columns, generator=GENERATOR) * columns**-0.5
        tensors[f"transformer.{layer.name}.lora_A.weight"] = down.bfloat16()
        up = torch.randn(rows, rank, generator=GENERATOR) * 0.01
        tensors[f"transformer.{layer.name}.lora_B.weight"] = up.bfloat16()
    save_file(tensors, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", default="nunchaku-lite")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    given = parser.parse_args()
    checkpoint = full_size_checkpoint(given.folder, given.format)
    lora = given.folder / f"rank{given.rank}.safetensors"
    if not lora.exists():
        plan, _ = full_size_plan(given.folder, FLUX_DEV, format_named(given.format), Int4())
        full_size_lora(lora, plan, given.rank)
        print("the LoRA is made; run again, so that its memory is not counted")
        return
    report = fold(
        checkpoint, [LoraFile(lora, 0.8)], given.folder / "folded", options=RunOptions(overwrite=True)
    )
    print(f"{len(report.keys)} layers, rank {report.rank}, bytes {report.bytes}")
    print(f"{report.seconds:.1f} s, {report.peak.ram_bytes / 1e9:.2f} GB of RAM")


if __name__ == "__main__":
    main()
