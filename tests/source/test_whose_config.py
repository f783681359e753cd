"""Tensors that are not those of the config: the error says where the config is from, and what a person can do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from svdq_cli.errors import InputError
from svdq_cli.planning.plan import plan_model
from svdq_cli.records import Int4
from svdq_cli.source import open_source
from tests.source.originals import real_keys
from tests.source.test_configs import SD3_COMMON, SDXL, meta_shapes, sparse_file
from tests.tiny import tiny_flux_transformer

SSD_1B = {
    **SDXL,
    "transformer_layers_per_block": (0, 2, 4),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
    "mid_block_type": "UNetMidBlock2D",
}
VEGA = {**SDXL, "transformer_layers_per_block": (1, 1, 2)}
LAYERED = {"num_layers": 1, "use_additional_t_cond": True, "use_layer3d_rope": True}
KLEIN = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 24, "guidance_embeds": False}
SD3 = {**SD3_COMMON, "num_layers": 2, "num_attention_heads": 4, "caption_projection_dim": 256}


def refusal(path: Path, base: Path | None = None) -> InputError:
    with pytest.raises(InputError) as error:
        plan_model(open_source(path, base=base), precision=Int4(), rank=32, supports=lambda layer: None)
    return error.value


def base_of(folder: Path, class_name: str, config: Mapping[str, Any]) -> Path:
    """A pipeline folder without weights."""
    component = "unet" if class_name.startswith("UNet") else "transformer"
    (folder / component).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({component: ["diffusers", class_name]}))
    said = json.dumps({"_class_name": class_name, **config})
    (folder / component / "config.json").write_text(said)
    return folder


@pytest.mark.parametrize(
    ("class_name", "config", "seen"),
    [
        ("UNet2DConditionModel", VEGA, "are missing"),
        ("UNet2DConditionModel", SSD_1B, "are missing"),
        ("QwenImageTransformer2DModel", LAYERED, "addition_t_embedding"),
        ("WanVACETransformer3DModel", {"num_layers": 1, "vace_layers": [0]}, "vace_blocks"),
    ],
    ids=[
        "a UNet with fewer blocks",
        "a UNet without attention in its middle",
        "a layered image model",
        "a video model with control",
    ],
)
def test_a_variant_without_its_pipeline_needs_a_base(
    tmp_path: Path, class_name: str, config: dict[str, Any], seen: str
):
    path = sparse_file(tmp_path / "model.safetensors", meta_shapes(class_name, config))
    error = refusal(path)
    assert error.kind == "needs-base"
    assert seen in str(error)
    assert "config.json" not in str(error)
    assert "--base" in str(error.hint)
    # and with its own pipeline it is read
    plan = plan_model(
        open_source(path, base=base_of(tmp_path / "base", class_name, config)),
        precision=Int4(),
        rank=32,
        supports=lambda layer: None,
    )
    assert plan.model_class == class_name


@pytest.mark.parametrize(
    ("class_name", "here", "there", "said"),
    [
        (
            "Flux2Transformer2DModel",
            {**KLEIN, "num_attention_heads": 32, "joint_attention_dim": 12288},
            {**KLEIN, "joint_attention_dim": 7680},
            [
                "num_attention_heads is 32 here, but 24 in the base",
                "joint_attention_dim is 12288 here, but 7680",
            ],
        ),
        (
            "SD3Transformer2DModel",
            {**SD3, "qk_norm": None},
            {**SD3, "dual_attention_layers": (0,)},
            ["qk_norm is None here, but rms_norm in the base", "dual_attention_layers is [] here, but [0]"],
        ),
        (
            "UNet2DConditionModel",
            VEGA,
            SDXL,
            ["transformer_layers_per_block is [0, 1, 2] here, but [0, 2, 10] in the base"],
        ),
    ],
    ids=["FLUX.2 klein 9B and 4B", "SD3 and SD3.5", "Vega and SDXL"],
)
def test_the_base_of_a_sister_model_is_refused_by_the_values_that_differ(
    tmp_path: Path, class_name: str, here: dict[str, Any], there: dict[str, Any], said: list[str]
):
    path = sparse_file(tmp_path / "model.safetensors", meta_shapes(class_name, here))
    base = base_of(tmp_path / "base", class_name, there)
    error = refusal(path, base)
    assert error.kind == "wrong-base"
    assert str(base) in str(error)
    assert all(text in str(error) for text in said)


def test_a_file_that_lacks_a_tensor_of_its_base_may_be_incomplete(tmp_path: Path):
    shapes = meta_shapes("Flux2Transformer2DModel", KLEIN)
    base = base_of(tmp_path / "base", "Flux2Transformer2DModel", KLEIN)
    del shapes["single_transformer_blocks.0.attn.to_out.weight"]
    shapes["single_transformer_blocks.0.attn.to_out.other"] = (1,)
    path = sparse_file(tmp_path / "model.safetensors", shapes | {"transformer_blocks.0.norm_extra": (3,)})
    error = refusal(path, base)
    assert (error.kind, error.where) == ("wrong-base", "single_transformer_blocks.0.attn.to_out.weight")
    assert "the file is incomplete" in str(error.hint)


def test_a_published_model_that_lacks_a_tensor_is_not_blamed_on_a_config(tmp_path: Path):
    keys = real_keys("flux1-dev.bfl")
    del keys["double_blocks.3.img_mlp.0.bias"]
    error = refusal(sparse_file(tmp_path / "flux1-dev.safetensors", keys))
    assert (error.kind, error.where) == ("needs-base", "transformer_blocks.3.ff.net.0.proj.bias")
    assert "config.json" not in str(error)


def test_a_folder_with_the_config_of_another_model_is_told_so(tmp_path: Path):
    sparse_file(
        tmp_path / "diffusion_pytorch_model.safetensors", meta_shapes("Flux2Transformer2DModel", KLEIN)
    )
    said = {"_class_name": "Flux2Transformer2DModel", **KLEIN, "joint_attention_dim": 100}
    (tmp_path / "config.json").write_text(json.dumps(said))
    error = refusal(tmp_path)
    assert error.where == "context_embedder.weight"
    assert "config.json belongs to a different model" in str(error.hint)


@pytest.mark.parametrize("fuse", [False, True], ids=["next to the weights", "fused into them"])
def test_a_model_saved_with_a_lora_on_is_called_that(tmp_path: Path, fuse: bool):
    model = tiny_flux_transformer()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    if fuse:
        model.fuse_lora()
    model.save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert "saved while a LoRA was loaded" in str(error)
    assert error.where == "single_transformer_blocks.0.attn.to_q.base_layer.bias"
    assert "unload_lora_weights()" in str(error.hint)


def test_what_that_hint_says_gives_a_model_that_is_read(tmp_path: Path):
    model = tiny_flux_transformer()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(tmp_path)
    assert plan_model(open_source(tmp_path), precision=Int4(), rank=32, supports=lambda layer: None)


def test_a_model_saved_with_fused_projections_is_called_that(tmp_path: Path):
    model = tiny_flux_transformer()
    model.fuse_qkv_projections()
    model.save_pretrained(tmp_path)
    error = refusal(tmp_path)
    assert "6 tensors do not belong to FluxTransformer2DModel" in str(error)
    assert "fuse_qkv_projections()" in str(error.hint)
