"""A transformer shaped like FLUX.1-dev with random weights, on disk: what conversions are timed on.

    python -m tools.generate_flux OUT --double 1 --single 4

writes OUT/config.json and its weights, tensor by tensor. Full width by default: each double block has 340 million
parameters, each single block 142 million; 19 and 38 of them are the published model's size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.random_model import write_random_model

HEAD = 128  # width of an attention head


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
    config = flux_config(double=double, single=single, heads=heads)
    return write_random_model(folder, config, seed=seed, device=device)


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
