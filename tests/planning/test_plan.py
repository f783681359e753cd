"""Every linear of a model is in the plan exactly once, and nothing is decided in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from svdq_cli.errors import InputError, RecipeError
from svdq_cli.formats import format_named
from svdq_cli.planning.plan import plan_model
from svdq_cli.recipe import KeepOverride, LayerOverride, RankOverride
from svdq_cli.records import Int4, ModelPlan, SharedInput, W4A4Plan
from svdq_cli.source import open_source

LITE = format_named("nunchaku-lite")

FLUX_DEV = {
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


def plan_of(path: Path, *overrides: LayerOverride, rank: int = 32) -> ModelPlan:
    return plan_model(
        open_source(path), precision=Int4(), rank=rank, overrides=overrides, supports=LITE.unsupported_reason
    )


@pytest.fixture(scope="module")
def flux_dev_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux") / "config.json"
    path.write_text(json.dumps(FLUX_DEV))
    return path


def test_flux_dev_is_planned_from_its_config_alone(flux_dev_config: Path):
    plan = plan_of(flux_dev_config)
    assert plan.family == "flux"
    assert plan.parameters == 11_901_408_320
    assert len(plan.w4a4) == 19 * 12 + 38 * 5
    assert len(plan.w4a16) == 19 * 2 + 38
    assert len(plan.w4a4) + len(plan.w4a16) + len(plan.kept) == 504  # every linear of the model


def test_a_config_without_a_class_name_is_recognized_by_its_keys(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in FLUX_DEV.items() if key != "_class_name"}))
    assert plan_of(path).model_class == "FluxTransformer2DModel"


def test_shared_inputs_cover_every_layer_once(tiny_flux: Path):
    plan = plan_of(tiny_flux)
    covered = [name for shared in plan.inputs for name in shared.layers]
    assert sorted(covered) == sorted(layer.name for layer in plan.layers)
    for shared in plan.inputs:
        assert sorted(name for part in shared.branches for name in part) == sorted(shared.layers)


@pytest.mark.parametrize("data_free", [False, True])
def test_layer_groups_take_every_layer_once_and_modulations_alone(tiny_flux: Path, data_free: bool):
    tiny = plan_of(tiny_flux)
    modulations = tuple(layer.name for layer in tiny.w4a16)
    assert len(modulations) > 1
    others = tuple(shared for shared in tiny.inputs if shared.layers[0] not in modulations)
    together = SharedInput("all blocks", modulations, tuple((name,) for name in modulations))
    plan = replace(tiny, inputs=(*others, together))  # as in a model of many blocks
    layer_groups = plan.layer_groups(data_free=data_free)
    covered = [name for layer_group in layer_groups for name in layer_group.layers]
    assert sorted(covered) == sorted(layer.name for layer in plan.layers)
    calibrated = {shared.name: shared for shared in plan.inputs}
    for layer_group in layer_groups:
        assert set(layer_group.layers) <= set(calibrated[layer_group.name].layers)
        assert sorted(name for part in layer_group.branches for name in part) == sorted(layer_group.layers)
        assert len(layer_group.layers) == 1 or not set(layer_group.layers) & set(modulations)
        assert set(layer_group.branches) <= set(calibrated[layer_group.name].branches)
        assert len(layer_group.branches) == 1 or not data_free


def test_qkv_share_input_and_branch_and_a_single_blocks_mlp_shares_the_input_only(tiny_flux: Path):
    inputs = {shared.name: shared for shared in plan_of(tiny_flux).inputs}
    double = inputs["transformer_blocks.0.attn.to_q"]
    assert [name.rsplit(".", 1)[1] for name in double.layers] == ["to_q", "to_k", "to_v"]
    assert double.branches == (double.layers,)
    single = inputs["single_transformer_blocks.0.attn.to_q"]
    assert single.layers[3] == "single_transformer_blocks.0.proj_mlp"
    assert single.branches == (single.layers[:3], single.layers[3:])


def test_an_override_sets_a_rank_or_keeps_a_layer(tiny_flux: Path):
    plan = plan_of(
        tiny_flux,
        RankOverride(match="*.ff.net.2", rank=64),
        KeepOverride(match="single_transformer_blocks.*", keep=True),
    )
    wide = plan.by_name["transformer_blocks.0.ff.net.2"]
    assert isinstance(wide, W4A4Plan)
    assert wide.rank == 64
    assert all(layer.name.startswith("transformer_blocks.") for layer in plan.layers)
    assert any(linear.name == "single_transformer_blocks.0.proj_out" for linear in plan.kept)


def test_an_override_that_matches_nothing_names_the_nearest_layer(tiny_flux: Path):
    with pytest.raises(RecipeError, match="matches no linear layer") as caught:
        plan_of(tiny_flux, KeepOverride(match="transformer_blocks.0.attn.to_qq", keep=True))
    assert "transformer_blocks.0.attn.to_q" in str(caught.value.hint)


def test_layers_the_format_cannot_hold_are_kept(tmp_path: Path):
    path = tmp_path / "config.json"
    config = {
        **FLUX_DEV,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "axes_dims_rope": [2, 2, 4],
    }
    path.write_text(json.dumps({**config, "num_attention_heads": 24}))  # hidden size 192: no multiple of 128
    plan = plan_of(path)
    kept = {linear.name for linear in plan.kept}
    assert "transformer_blocks.0.attn.to_q" in kept
    assert all(layer.linear.out_features % 128 == 0 for layer in plan.w4a4)


def test_a_class_that_nobody_defines_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "MysteryTransformer"}))
    with pytest.raises(InputError, match="MysteryTransformer") as caught:
        plan_of(path)
    assert caught.value.kind == "unknown-family"
    assert "upgrade diffusers" in str(caught.value.hint)


def test_weights_of_another_model_are_refused(tiny_flux_copy: Path):
    config = tiny_flux_copy / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_single_layers": 2}))
    with pytest.raises(InputError, match=r"missing, such as single_transformer_blocks\.1"):
        plan_of(tiny_flux_copy)
