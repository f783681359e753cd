"""Roles that one forward pass shows, of diffusers' own classes at their published widths. Weights have no memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from svdq_cli.entrypoints.inspect import inspect_source
from svdq_cli.formats import format_named
from svdq_cli.planning.inventory import Inventory, take_inventory
from svdq_cli.planning.plan import plan_model
from svdq_cli.planning.structure import structural_roles
from svdq_cli.planning.trace_inputs import watch
from svdq_cli.recipe import default_recipe
from svdq_cli.records import Int4, ModelPlan
from svdq_cli.source import open_source

LITE = format_named("nunchaku-lite")


@pytest.fixture
def plan_of(tmp_path: Path):
    """The structural plan of a class with these arguments, from its bare config."""

    def plan(name: str, **config: Any) -> ModelPlan:
        return plan_model(
            open_source(write_config(tmp_path, name, config)),
            precision=Int4(),
            rank=32,
            family="structural",
            supports=LITE.unsupported_reason,
        )

    return plan


def write_config(folder: Path, name: str, config: Mapping[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"_class_name": name, **config}))
    return path


def roles(plan: ModelPlan, prefix: str) -> dict[str, str]:
    """Role by layer name below `prefix`, of block layers and others."""
    found = {layer.name: "w4a4" for layer in plan.w4a4} | {layer.name: "w4a16" for layer in plan.w4a16}
    found |= {linear.name: "kept" for linear in plan.kept}
    return {name.removeprefix(prefix): role for name, role in found.items() if name.startswith(prefix)}


def groups(plan: ModelPlan, prefix: str) -> set[tuple[str, ...]]:
    """Layers below `prefix` that share an input with others."""
    return {
        tuple(name.removeprefix(prefix) for name in shared.layers)
        for shared in plan.inputs
        if len(shared.layers) > 1 and shared.name.startswith(prefix)
    }


def test_text_keys_and_values_of_a_video_model_are_quantized_like_the_rest(plan_of):
    plan = plan_of("WanTransformer3DModel", num_layers=2)
    assert set(roles(plan, "blocks.1.").values()) == {"w4a4"}
    assert groups(plan, "blocks.1.") == {
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
    }


def test_a_model_that_reads_the_values_of_its_inputs_is_seen_running(plan_of):
    plan = plan_of("Lumina2Transformer2DModel", num_layers=1)
    assert groups(plan, "layers.0.") == {
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("feed_forward.linear_1", "feed_forward.linear_3"),
    }
    assert roles(plan, "layers.0.")["norm1.linear"] == "w4a16"
    assert roles(plan, "context_refiner.0.")["attn.to_out.0"] == "w4a4"


@pytest.mark.parametrize("projected", [True, False], ids=["2.0", "later"])
def test_ltx_2_whose_text_is_modulated_is_seen_running(plan_of, projected: bool):
    """Without a projection of captions, a table as wide as the video is added to them before any layer reads them."""
    plan = plan_of(
        "LTX2VideoTransformer3DModel",
        num_layers=1,
        use_prompt_embeddings=projected,
        **dict.fromkeys(
            ("cross_attn_mod", "audio_cross_attn_mod", "gated_attn", "audio_gated_attn"), not projected
        ),
    )
    assert not plan.by_names
    assert ("attn2.to_k", "attn2.to_v") in groups(plan, "transformer_blocks.0.")


def test_layers_called_mode_blocks_are_no_modulation(plan_of):
    plan = plan_of("Flux3Transformer2DModel", num_layers=1, num_single_layers=1)
    reference = roles(plan, "mode_blocks.image_cond.0.")
    assert set(reference.values()) == {"w4a4"}
    assert ("attn.to_q", "attn.to_k", "attn.to_v", "ff.linear_in") in groups(
        plan, "mode_blocks.image_cond.0."
    )


def test_motion_modules_are_no_modulation_seen_or_not(plan_of, tmp_path: Path):
    plan = plan_of("UNetMotionModel")
    motion = {role for name, role in roles(plan, "").items() if "motion_modules" in name}
    assert motion == {"w4a4", "kept"}  # the narrow ones fit no kernel
    source = open_source(write_config(tmp_path, "MotionAdapter", {}))
    found = structural_roles(take_inventory(source, None), None)
    assert not found.w4a16
    assert len(found.w4a4) == 252


def test_names_alone_tell_modulation_by_whole_words():
    assert roles_by_name("img_mod.1", "adaLN_modulation.0", "norm1.linear", "time_emb_proj") == {"w4a16"}
    assert roles_by_name("mode.q", "model.k", "modality.v", "adapter.o", "motion_module.q") == {"w4a4"}


def roles_by_name(*names: str) -> set[str]:
    from svdq_cli.records import Linear

    linears = tuple(Linear(f"blocks.0.{name}", 128, 128, bias=False) for name in names)
    found = structural_roles(Inventory("Any", linears, {}, 0, ("blocks",)), None)
    return {"w4a16" if linear.name in found.w4a16 else "w4a4" for linear in linears}


def test_a_network_that_makes_every_modulation_stays_and_says_why(plan_of):
    plan = plan_of("ChromaTransformer2DModel", num_layers=1, num_single_layers=1)
    made = roles(plan, "distilled_guidance_layer.")
    assert set(made.values()) == {"kept"}
    assert "modulation" in plan.kept_because["distilled_guidance_layer.layers.0.linear_1"]
    assert set(roles(plan, "single_transformer_blocks.0.").values()) == {"w4a4"}


def test_a_router_stays_and_stacked_experts_become_layers(plan_of, tmp_path: Path):
    config = {"num_layers": 2, "dense_moe_strategy": "leave_first_block_dense"}
    plan = plan_of("NucleusMoEImageTransformer2DModel", **config)
    assert "experts" in plan.kept_because["transformer_blocks.1.img_mlp.gate"]
    found = roles(plan, "transformer_blocks.1.img_mlp.")
    assert found["shared_expert.net.0.proj"] == "w4a4"
    assert {role for name, role in found.items() if "gate_up_proj" in name} == {"w4a4"}
    # 1344 columns are no whole tiles of 128, but of 64
    assert {role for name, role in found.items() if "down_proj" in name} == {"w4a16"}
    report = inspect_source(default_recipe(str(tmp_path / "config.json")))
    assert report.bytes.ratio > 3
    (said,) = (warning for warning in report.warnings if "experts, which" in warning)
    assert "256 layers (128 W4A4, 128 W4A16)" in said


def test_inspect_says_which_sizes_fit_no_kernel(tmp_path: Path):
    path = write_config(
        tmp_path, "BriaFibo2Transformer2DModel", {"num_layers": 1, "injection_layer_ids": [0]}
    )
    report = inspect_source(default_recipe(str(path)))
    assert any("9536 is not a multiple of 128" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("name", "config", "stack", "modulation"),
    [
        # one vector a frame, added to all its pixels
        ("UNetSpatioTemporalConditionModel", {}, "mid_block.resnets.0.", "spatial_res_block.time_emb_proj"),
        # packed rows without a batch, a table of noise levels and modalities
        ("MiniMaxH3Transformer3DModel", {"num_layers": 1}, "transformer_blocks.0.", "adaln_proj.linear"),
    ],
    ids=["per-frame", "packed"],
)
def test_modulation_is_what_it_does(plan_of, name: str, config: dict[str, Any], stack: str, modulation: str):
    found = roles(plan_of(name, **config), stack)
    assert {layer for layer, role in found.items() if role == "w4a16"} >= {modulation}


def test_experts_that_no_token_went_to_are_planned_like_the_others(plan_of):
    config = {
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 0, "num_single_layers": 1,
        "attention_head_dim": 128, "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048,
        "num_routed_experts": 64, "num_activated_experts": 2, "axes_dims_rope": [64, 32, 32],
        "max_resolution": [128, 128], "llama_layers": [0],
    }  # fmt: skip
    plan = plan_of("HiDreamImageTransformer2DModel", **config)
    experts = {n: r for n, r in roles(plan, "").items() if ".experts." in n}
    assert len(experts) == 64 * 3
    assert set(experts.values()) == {"w4a4"}


def test_a_class_that_nobody_can_call_has_no_reading(tmp_path: Path):
    import torch
    from diffusers.models import MotionAdapter

    with torch.device("meta"):
        model = MotionAdapter()
    assert watch(model) is None


def test_attention_that_torch_compiled_for_the_pass_is_compiled_anew_for_what_runs_after_it(plan_of):
    plan_of("AnyFlowFARTransformer3DModel", num_layers=1)
    x = torch.randn(1, 2, 16, 64)
    attention = flex_attention(x, x, x)
    assert isinstance(attention, torch.Tensor)
    torch.testing.assert_close(attention, torch.nn.functional.scaled_dot_product_attention(x, x, x))
