"""Real models at full size, without weights: their configs, and a plan from them."""

from __future__ import annotations

import json
from pathlib import Path

from svdq_cli.families import find_family
from svdq_cli.formats.contract import Format
from svdq_cli.planning.plan import Inventory, plan_model, take_inventory
from svdq_cli.records import ModelPlan, Precision
from svdq_cli.source import open_source

FLUX_DEV: dict[str, object] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}


def full_size_plan(
    folder: Path, config: dict[str, object], fmt: Format, precision: Precision, *, rank: int = 32
) -> tuple[ModelPlan, Inventory]:
    """The plan of a model at its real size, and its inventory. Nothing is allocated."""
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    source = open_source(path)
    plan = plan_model(
        source,
        precision=precision,
        rank=rank,
        supports=lambda layer: fmt.unsupported_reason(layer) if fmt.mixes else None,
    )
    return plan, take_inventory(source, find_family(source.config))
