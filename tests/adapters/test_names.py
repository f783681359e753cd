"""Every name that trainers give a layer leads to the same tensors, whatever stands before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras, shapes_of
from svdq_cli.adapters.names import ModelShapes
from svdq_cli.adapters.read import Adapter, read_adapter
from svdq_cli.errors import InputError
from svdq_cli.source import open_source, read_tensor
from svdq_cli.source.denoisers import joined
from tests.adapters.test_loras import BFL, QKV, drawn, weights_of
from tests.source.test_configs import meta_shapes
from tests.tiny_families import tiny_pipeline

WAN = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "text_dim": 64}
CHROMA = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "approximator_num_channels": 64,
    "approximator_hidden_dim": 128,
    "approximator_layers": 1,
}


def model_of(class_name: str, config: Mapping[str, object]) -> ModelShapes:
    return ModelShapes(Path("model"), class_name, meta_shapes(class_name, config))


@pytest.fixture(scope="module")
def models() -> dict[str, ModelShapes]:
    return {
        "wan": model_of("WanTransformer3DModel", WAN),
        "chroma": model_of("ChromaTransformer2DModel", CHROMA),
    }


def lora_of(model: ModelShapes, name: str, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """Halves of the size that a layer of these targets has, under kohya's endings."""
    shapes = [model.shapes[f"{target}.weight"] for target in targets]
    rows, columns = sum(shape[0] for shape in shapes), torch.Size(shapes[0][1:]).numel()
    return {
        f"{name}.lora_down.weight": torch.ones(2, columns),
        f"{name}.lora_up.weight": torch.ones(rows, 2),
        f"{name}.alpha": torch.tensor(2.0),
    }


def read(tensors: dict[str, Tensor], model: ModelShapes, folder: Path) -> Adapter:
    save_file(tensors, folder / "lora.safetensors")
    return read_adapter(folder / "lora.safetensors", model)


DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


@pytest.mark.parametrize(
    ("family", "name", "targets"),
    [
        # musubi and kohya flatten the original names, ComfyUI and trainers of the original code keep their dots
        ("wan", "lora_unet_blocks_0_self_attn_q", ("blocks.0.attn1.to_q",)),
        ("wan", "lora_unet_blocks_0_cross_attn_o", ("blocks.0.attn2.to_out.0",)),
        ("wan", "diffusion_model.blocks.0.ffn.0", ("blocks.0.ffn.net.0.proj",)),
        ("wan", "blocks.0.ffn.2", ("blocks.0.ffn.net.2",)),
        ("wan", "diffusion_model.head.head", ("proj_out",)),
        ("wan", "diffusion_model.time_projection.1", ("condition_embedder.time_proj",)),
        ("wan", "diffusion_model.text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
        ("wan", "transformer.blocks.0.attn1.to_q", ("blocks.0.attn1.to_q",)),
        ("wan", "lora_transformer_blocks_0_attn1_to_q", ("blocks.0.attn1.to_q",)),
        ("wan", "pipe.dit.blocks.0.self_attn.v", ("blocks.0.attn1.to_v",)),
        ("chroma", "lora_unet_double_blocks_0_img_attn_proj", (f"{DOUBLE}.attn.to_out.0",)),
        (
            "chroma",
            "lora_unet_double_blocks_0_txt_attn_qkv",
            tuple(f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"),
        ),
        (
            "chroma",
            "diffusion_model.single_blocks.0.linear1",
            (*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"),
        ),
        ("chroma", "transformer.single_transformer_blocks.0.proj_out", (f"{SINGLE}.proj_out",)),
        ("chroma", "diffusion_model.img_in", ("x_embedder",)),
    ],
)
def test_original_names_lead_to_the_layers(
    models: dict[str, ModelShapes], tmp_path: Path, family: str, name: str, targets: tuple[str, ...]
):
    adapter = read(lora_of(models[family], name, targets), models[family], tmp_path)
    assert set(adapter.weights) == {f"{target}.weight" for target in targets}


def test_an_extracted_wan_lora_changes_biases_and_norms_too(models: dict[str, ModelShapes], tmp_path: Path):
    """Distillations for Wan are spread so: factors of linear layers, differences of biases and norms."""
    name = "diffusion_model.blocks.0.cross_attn.k"
    tensors = {
        **lora_of(models["wan"], name, ("blocks.0.attn2.to_k",)),
        f"{name}.diff_b": torch.ones(128),
        "diffusion_model.blocks.0.norm3.diff": torch.ones(128),
        "diffusion_model.blocks.0.norm3.diff_b": torch.ones(128),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(128),
    }
    adapter = read(tensors, models["wan"], tmp_path)
    assert set(adapter.weights) == {"blocks.0.attn2.to_k.weight"}
    assert set(adapter.vectors) == {
        "blocks.0.attn2.to_k.bias",
        "blocks.0.norm2.weight",
        "blocks.0.norm2.bias",
        "blocks.0.attn1.norm_q.weight",
    }


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "transformer.", "diffusion_model.", "model.diffusion_model.", "unet.", "base_model.model."),
        *("module.", "_orig_mod.", "net.", "model.", "dit.", "pipe.dit.", "lora_transformer."),
        *("base_model.model.transformer.", "base_model.model.diffusion_model.", "module._orig_mod."),
        *("transformer._orig_mod.", "_orig_mod.base_model.model.", "model.net.", "diffusion_model.module."),
        *("_fsdp_wrapped_module._orig_mod.", "model.model.diffusion_model."),
    ],
)
def test_wrappers_names_come_off_one_after_the_other(tiny_flux: Path, tmp_path: Path, prefix: str):
    down, up = drawn(128, 128, 0)
    file = tmp_path / "lora.safetensors"
    layer = QKV[0].replace("attn", "_orig_mod.attn") if prefix == "_orig_mod.base_model.model." else QKV[0]
    other = next(name for name in BFL if name.endswith("to_out.0"))
    tensors = {
        f"{prefix}{layer}.lora_A.weight": down,
        f"{prefix}{layer}.lora_B.weight": up,
        f"{prefix}{BFL[other]}.lora_A.weight": down.clone(),
        f"{prefix}{BFL[other]}.lora_B.weight": up.clone(),
    }
    save_file(tensors, file)
    merged = merge_loras(open_source(tiny_flux), [LoraFile(file, 1.0)])
    before = weights_of(tiny_flux)
    changed = {name for name in before if not torch.equal(read_tensor(merged, name), before[name])}
    assert changed == {f"{QKV[0]}.weight", f"{other}.weight"}


def test_keys_for_every_text_encoder_are_left_out(tiny_flux: Path, tmp_path: Path):
    down, up = drawn(128, 128, 0)
    file = tmp_path / "lora.safetensors"
    text = (
        *("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_x", "lora_te2_x", "lora_te3_x", "te1_x"),
        *("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.encoder.block.0.x"),
        *("text_encoders.clip_l.x", "base_model.model.text_encoder.x", "clip_l.transformer.x", "t5xxl.x"),
        *("cond_stage_model.x", "conditioner.embedders.0.x"),
    )
    tensors = {f"{name}.lora_down.weight": torch.ones(1, 1) for name in text}
    tensors |= {"bundle_emb.word.string_to_param.*": torch.ones(1), "<s0>": torch.ones(1)}
    left = len(tensors)
    tensors |= {f"transformer.{QKV[0]}.lora_down.weight": down, f"transformer.{QKV[0]}.lora_up.weight": up}
    save_file(tensors, file)
    merged = merge_loras(open_source(tiny_flux), [LoraFile(file, 1.0)])
    assert f"left out {left} tensors for the text encoders" in merged.warnings[0]


def test_a_lora_for_text_encoders_alone_is_refused_and_says_so(
    models: dict[str, ModelShapes], tmp_path: Path
):
    tensors = {f"lora_te1_x.lora_{half}.weight": torch.ones(1, 1) for half in ("down", "up")}
    with pytest.raises(InputError, match="a LoRA for the text encoders alone"):
        read(tensors, models["wan"], tmp_path)


def test_names_tell_the_denoiser_of_a_lora(tmp_path: Path):
    """Wan 2.2: the first transformer denoises what is noisy, the second one the rest."""
    source = open_source(tiny_pipeline("wan", tmp_path / "wan"))
    pair = joined([source, replace(source, component="transformer_2")])
    name = "blocks.0.self_attn.q"
    model = shapes_of(pair)
    first = read(lora_of(model, f"diffusion_model.{name}", ("blocks.0.attn1.to_q",)), model, tmp_path)
    assert set(first.weights) == {"blocks.0.attn1.to_q.weight"}
    other = lora_of(model, f"transformer_2.{name}", ("blocks.0.attn1.to_q",))
    second = read(other, model, tmp_path)
    assert set(second.weights) == {"transformer_2.blocks.0.attn1.to_q.weight"}
    both = {**other, **lora_of(model, f"transformer.{name}", ("blocks.0.attn1.to_q",))}
    assert len(read(both, model, tmp_path).weights) == 2
