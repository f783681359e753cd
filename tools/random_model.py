"""Models of diffusers' classes with random weights, on disk, in any size: what conversions are timed and tried on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor, nn

from svdq_cli.storage.tensor_file import TensorSpec, write_tensors

OUTLIERS = 64  # one input channel in so many is an outlier
OUTLIER_SIZE = 12.0  # times the others: what smoothing and the low-rank branch are there for


def write_random_model(
    folder: Path, config: Mapping[str, object], *, seed: int = 0, device: str = "cpu"
) -> int:
    """Write `config` and bfloat16 weights; returns the number of parameters. The same arguments on one device give the
    same bytes."""
    model_class: Any = getattr(diffusers, str(config["_class_name"]))
    with torch.device("meta"):
        model = cast("nn.Module", model_class.from_config(dict(config)))
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
    """bfloat16. Matrices and kernels keep the variance of what they read, and matrices have outlier channels; norms are
    one; biases small. A tensor depends on its name and the seed, not on its neighbors."""
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
    )
    values = torch.randn(shape, generator=generator, device=device)
    if len(shape) == 1:
        return (values * 0.02).bfloat16()
    values *= torch.Size(shape[1:]).numel() ** -0.5
    if len(shape) == 2:
        values[:, torch.randperm(shape[1], generator=generator, device=device)[: shape[1] // OUTLIERS]] *= (
            OUTLIER_SIZE
        )
    return values.bfloat16()
