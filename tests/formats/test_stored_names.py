"""The modules of each file, block by block, as its runtime's loader expects them; padding against golden bytes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdq_cli.checkpoint.assembly import join_layers, take_layer
from svdq_cli.checkpoint.match_layout import lay_out
from svdq_cli.checkpoint.writer import target_of
from svdq_cli.families.layouts.layout import BlockLayout, ModelLayout, same
from svdq_cli.formats import format_named
from svdq_cli.records import Int4, Linear, NvFp4, Precision, W4A4Plan, W4A4Solution
from tests.formats.solutions import differing_fields, same_bits
from tests.full_size import full_size_plan

GOLDEN = Path(__file__).parents[1] / "golden"

QWEN: dict[str, object] = {
    "_class_name": "QwenImageTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
}
Z_IMAGE: dict[str, object] = {"_class_name": "ZImageTransformer2DModel"}  # the class's defaults are the model
SANA: dict[str, object] = {"_class_name": "SanaTransformer2DModel"}  # the 1.6 B model

QWEN_NUNCHAKU = {
    **dict.fromkeys(("attn.to_qkv", "attn.add_qkv_proj", "attn.to_out.0", "attn.to_add_out"), "w4a4"),
    **dict.fromkeys(("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"), "w4a4"),
    **dict.fromkeys(("img_mod.1", "txt_mod.1"), "w4a16"),
}
Z_IMAGE_NUNCHAKU = dict.fromkeys(
    ("attention.to_qkv", "attention.to_out.0", "feed_forward.net.0.proj", "feed_forward.net.2"), "w4a4"
)
Z_IMAGE_OMNI = dict.fromkeys(("attention.to_qkv", "attention.to_out.0", "feed_forward.w2"), "w4a4")
SANA_NUNCHAKU = dict.fromkeys(
    (
        "attn.qkv_proj",
        "attn.out_proj",
        "cross_attn.q_linear",
        "cross_attn.out_proj",
        "ff.inverted_conv",
        "ff.point_conv",
    ),
    "w4a4",
)


def stored_modules(folder: Path, config: dict[str, object], name: str, precision: Precision):
    fmt = format_named(name)
    plan, inventory = full_size_plan(folder, config, fmt, precision)
    return target_of(fmt, plan, inventory.state, torch.bfloat16)


@pytest.mark.parametrize(
    ("config", "name", "precision", "stacks", "modules"),
    [
        (QWEN, "nunchaku", Int4(), {"transformer_blocks": 60}, QWEN_NUNCHAKU),
        (
            Z_IMAGE,
            "nunchaku",
            NvFp4(),
            {"noise_refiner": 2, "context_refiner": 2, "layers": 30},
            Z_IMAGE_NUNCHAKU,
        ),
        (
            Z_IMAGE,
            "vllm-omni",
            NvFp4(),
            {"noise_refiner": 2, "context_refiner": 2, "layers": 30},
            Z_IMAGE_OMNI,
        ),
        (SANA, "nunchaku", Int4(), {"transformer_blocks": 20}, SANA_NUNCHAKU),
    ],
    ids=["qwen-nunchaku", "z-image-nunchaku", "z-image-vllm-omni", "sana-nunchaku"],
)
def test_the_modules_of_every_block_at_full_size(
    tmp_path: Path,
    config: dict[str, object],
    name: str,
    precision: Precision,
    stacks,
    modules: dict[str, str],
):
    target = stored_modules(tmp_path, config, name, precision)
    expected = {
        f"{stack}.{index}.{module}": kind
        for stack, count in stacks.items()
        for index in range(count)
        for module, kind in modules.items()
    }
    found = {m.name: "w4a4" if isinstance(m.plan, W4A4Plan) else "w4a16" for m in target.file.modules}
    assert found == expected


def test_qwen_image_in_comfy_is_720_modules_and_120_modulations(tmp_path: Path):
    target = stored_modules(tmp_path, QWEN, "comfy", Int4())
    kinds = Counter(type(module.plan).__name__ for module in target.file.modules)
    assert kinds == {"W4A4Plan": 60 * 12, "W4A16Plan": 60 * 2}
    assert sum(module.traits.unsigned for module in target.file.modules) == 60 * 2
    assert not [name for name in target.file.kept if "_mod." in name]


def test_sanas_queries_keys_and_values_are_padded_one_by_one(tmp_path: Path):
    """2240 channels are 17.5 tiles; each of q, k, v becomes 18."""
    target = stored_modules(tmp_path, SANA, "nunchaku", Int4())
    linear = {m.name: m.plan.linear for m in target.file.modules}["transformer_blocks.0.attn.qkv_proj"]
    assert (linear.out_features, linear.in_features) == (3 * 2304, 2304)
    assert {
        "transformer_blocks.0.cross_attn.kv_linear.weight",
        "transformer_blocks.0.ff.depth_conv.weight",
    } <= (target.file.kept.keys())


# ---------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize(
    "name",
    ["pack_int4_200x192_r20", "pack_int4_384x192_r48", "pack_nvfp4_200x192_r20", "pack_nvfp4_256x192_r16"],
)
def test_padded_modules_have_the_golden_bytes(name: str):
    """But for the bias, which the golden packer fills with ones: zeros keep padded channels out of the next layer."""
    file = load_file(GOLDEN / f"{name}.safetensors")
    precision: Precision = NvFp4() if "nvfp4" in name else Int4()
    rows, columns = file["in.codes"].shape
    # a rank is whole before a module is made; padded here with zeros
    rank = -(-len(file["in.lora_down"]) // 16) * 16
    down = torch.zeros(rank, columns, dtype=torch.bfloat16)
    up = torch.zeros(rows, rank, dtype=torch.bfloat16)
    down[: len(file["in.lora_down"])], up[:, : file["in.lora_up"].shape[1]] = (
        file["in.lora_down"],
        file["in.lora_up"],
    )
    plan = W4A4Plan(Linear("blocks.0.layer", columns, rows, True), precision, rank)
    solution = W4A4Solution(
        plan,
        file["in.smooth"],
        down,
        up,
        file["in.codes"],
        file["in.scales"],
        file.get("in.wcscales"),
        file["in.bias"],
    )
    layout = ModelLayout(
        "any",
        "nunchaku",
        (BlockLayout("blocks", "blocks", (same("layer"),)),),
        dialect="engine",
        row_scales=isinstance(precision, NvFp4),
        pads=True,
    )
    fmt = format_named("nunchaku")
    (module,) = lay_out(fmt, layout, (plan,), {"blocks.0.layer.weight": (rows, columns)}).modules
    joined = join_layers(module, {plan.name: solution})
    stored = fmt.encode(joined, module.traits)
    for key in ("qweight", "wscales", "smooth", "lora_down", "lora_up", "wcscales"):
        if f"packed.{key}" in file:
            assert same_bits(stored[key], file[f"packed.{key}"]), key
    decoded = fmt.decode(module.plan, stored, module.traits)
    assert differing_fields(take_layer(plan, [(module, decoded)], None), solution) == []
