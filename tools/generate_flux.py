"""A transformer shaped like FLUX.1-dev with random weights, on disk: what conversions are timed on.

    python -m tools.generate_flux OUT --double 1 --single 4

writes OUT/config.json and its weights, tensor by tensor. Full width by default: each double block has 340 million
parameters, each single block 142 million; 19 and 38 of them are the published model's size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from svdq_cli.storage.tensor_file import TensorSpec, write_tensors

HEAD = 128  # width of an attention head
OUTLIERS = 64  # one input channel in so many is an outlier
OUTLIER_SIZE = 12.0  # times the others: what smoothing and the low-rank branch are there for


def flux_config(*, double: int, single: int, heads: int) -> dict[str, object]:
    """FLUX.1-dev's config with other numbers of blocks and heads."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": HEAD,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": [16, 56, 56],
    }


def generate_flux(
    folder: Path, *, double: int, single: int, heads: int = 24, seed: int = 0, device: str = "cpu"
) -> int:
    """Write the folder; returns the number of parameters. The same arguments on one device give the same bytes."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    config = flux_config(double=double, single=single, heads=heads)
    with torch.device("meta"):
        model = cast("torch.nn.Module", FluxTransformer2DModel.from_config(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    file = folder / "diffusion_pytorch_model.safetensors"
    with write_tensors(file, specs, {"format": "pt"}) as writer:
        for name, shape in shapes.items():
            writer.write(name, random_tensor(name, shape, seed=seed, device=torch.device(device)))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def random_tensor(name: str, shape: tuple[int, ...], *, seed: int, device: torch.device) -> Tensor:
    """bfloat16. Matrices keep the variance of what they read and have outlier channels; norms are one; biases small.
    A tensor depends on its name and the seed, not on its neighbors."""
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
    )
    values = torch.randn(shape, generator=generator, device=device)
    if len(shape) == 1:
        return (values * 0.02).bfloat16()
    values *= shape[1] ** -0.5
    values[:, torch.randperm(shape[1], generator=generator, device=device)[: shape[1] // OUTLIERS]] *= (
        OUTLIER_SIZE
    )
    return values.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.generate_flux", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--double", type=int, default=1, help="double blocks")
    parser.add_argument("--single", type=int, default=4, help="single blocks")
    parser.add_argument("--heads", type=int, default=24, help=f"attention heads of width {HEAD}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where to generate the numbers")
    given = parser.parse_args()
    count = generate_flux(
        given.out,
        double=given.double,
        single=given.single,
        heads=given.heads,
        seed=given.seed,
        device=given.device,
    )
    print(f"{given.out}: {count / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
