"""A model is told from names and shapes alone: class, variant and config, at full size, without reading a weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import models
from safetensors.torch import save_file

from svdq_cli.errors import InputError
from svdq_cli.planning.inventory import take_inventory
from svdq_cli.planning.plan import plan_model
from svdq_cli.records import Int4
from svdq_cli.source import open_source
from svdq_cli.source.configs import class_of_names, published_config
from svdq_cli.source.names import convert_names
from svdq_cli.source.original_names import FLUX1, SANA
from tests.source.originals import MemoryTensor, original_state, real_keys
from tests.tiny_families import tiny_pipeline

FLUX = {"guidance_embeds": True}
SD3_COMMON = {
    "out_channels": 16,
    "pooled_projection_dim": 2048,
    "joint_attention_dim": 4096,
    "qk_norm": "rms_norm",
}
SANA_SMALL = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD2 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}

# Published models: class and the values that differ from the class's defaults.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1-dev": ("FluxTransformer2DModel", FLUX),
    "FLUX.1-schnell": ("FluxTransformer2DModel", {"guidance_embeds": False}),
    "FLUX.1-Fill-dev": ("FluxTransformer2DModel", {**FLUX, "in_channels": 384, "out_channels": 64}),
    "FLUX.1 with 8 double blocks": ("FluxTransformer2DModel", {**FLUX, "num_layers": 8}),
    "FLUX.2-dev": ("Flux2Transformer2DModel", {}),
    "Chroma1-HD": ("ChromaTransformer2DModel", {}),
    "Wan 2.1 T2V 1.3B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    "Wan 2.1 T2V 14B": ("WanTransformer3DModel", {}),
    "Wan 2.1 I2V 14B": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "Wan 2.1 FLF2V 14B": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
    ),
    "Wan 2.2 I2V A14B": ("WanTransformer3DModel", {"in_channels": 36}),
    "Wan 2.2 TI2V 5B": (
        "WanTransformer3DModel",
        {
            "in_channels": 48,
            "out_channels": 48,
            "num_attention_heads": 24,
            "ffn_dim": 14336,
            "num_layers": 30,
        },
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {"num_layers": 60}),
    "Z-Image": ("ZImageTransformer2DModel", {"axes_lens": [1536, 512, 512]}),
    "SANA 1.6B": ("SanaTransformer2DModel", {}),
    "SANA 0.6B": ("SanaTransformer2DModel", SANA_SMALL),
    "SANA 1.5 4.8B": ("SanaTransformer2DModel", {"num_layers": 60, "qk_norm": "rms_norm_across_heads"}),
    "SANA-Sprint 1.6B": (
        "SanaTransformer2DModel",
        {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
    ),
    "SD3.5-large": (
        "SD3Transformer2DModel",
        {
            **SD3_COMMON,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
    ),
    "SD3.5-medium": (
        "SD3Transformer2DModel",
        {
            **SD3_COMMON,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "SD1.5": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
    "SD1.5 inpainting": (
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "in_channels": 9},
    ),
    "SD2.1": ("UNet2DConditionModel", SD2),
    "SDXL": ("UNet2DConditionModel", SDXL),
}


def meta_shapes(class_name: str, config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = getattr(models, class_name)(**config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_of_a_published_model_is_read_off_its_shapes(name: str):
    class_name, config = PUBLISHED[name]
    shapes = meta_shapes(class_name, config)
    entries = {key: MemoryTensor(torch.empty(shape, device="meta")) for key, shape in shapes.items()}
    known = class_of_names(entries)
    assert known is not None
    assert known.model_class == class_name
    found = published_config(known, entries, {})
    assert found is not None
    arguments = {key: value for key, value in found.items() if key != "_class_name"}
    assert meta_shapes(class_name, arguments) == shapes
    with torch.device("meta"):
        given = dict(getattr(models, class_name)(**config).config)
        inferred = dict(getattr(models, class_name)(**arguments).config)
    for key in arguments.keys() | config.keys():
        assert _plain(inferred[key]) == _plain(given[key]), key


@pytest.mark.parametrize(
    ("positions", "side", "scale"),
    [(1024, 32, None), (4096, 64, 1.0), (16384, 128, 2.0)],
    ids=["1K", "2K", "4K"],
)
def test_the_size_of_sanas_images_is_told_by_positions_that_diffusers_computes_itself(
    tmp_path: Path, positions: int, side: int, scale: float | None
):
    shapes = meta_shapes("SanaTransformer2DModel", {"num_layers": 1})
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    original = {name: tuple(tensor.shape) for name, tensor in original_state(SANA, state).items()}
    path = sparse_file(tmp_path / "sana.safetensors", {**original, "pos_embed": (1, positions, 2240)})
    config = open_source(path).config
    assert (config["sample_size"], config["interpolation_scale"]) == (side, scale)


def test_the_base_of_sanas_other_size_is_refused(tmp_path: Path):
    base = tiny_pipeline("sana", tmp_path / "base")
    source = open_source(base)
    state = {name: entry.read() for name, entry in source.tensors.items()}
    save_file(
        {**original_state(SANA, state), "pos_embed": torch.zeros(1, 4096, 1)}, tmp_path / "2k.safetensors"
    )
    with pytest.raises(InputError, match=r"interpolation_scale is 1\.0 here, but None in the base") as error:
        open_source(tmp_path / "2k.safetensors", base=base)
    assert error.value.kind == "wrong-base"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def sparse_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A bfloat16 safetensors file of full size whose weights are a hole in the disk."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def planned(path: Path) -> tuple[str, int, int, int]:
    source = open_source(path)
    plan = plan_model(source, precision=Int4(), rank=32, supports=lambda layer: None)
    return plan.family, len(plan.w4a4), len(plan.w4a16), plan.parameters


def test_flux1_dev_is_planned_from_the_header_of_a_bfl_file(tmp_path: Path):
    keys = real_keys("flux1-dev.bfl")
    path = sparse_file(tmp_path / "flux1-dev.safetensors", keys)
    source = open_source(path)
    assert len(source.tensors) == 1160
    assert source.config["guidance_embeds"] is True
    family, w4a4, w4a16, parameters = planned(path)
    # A double block: q, k, v, out and two MLP layers in each of two streams; a single block: q, k, v, MLP in, out.
    assert (family, w4a4, w4a16, parameters) == ("flux", 19 * 12 + 38 * 5, 19 * 2 + 38, 11901408320)
    assert take_inventory(source, None).state.keys() == source.tensors.keys()


def test_flux1_schnell_is_told_by_its_missing_guidance(tmp_path: Path):
    keys = {name: shape for name, shape in real_keys("flux1-dev.bfl").items() if "guidance" not in name}
    source = open_source(sparse_file(tmp_path / "schnell.safetensors", keys))
    assert source.config["guidance_embeds"] is False


def test_a_comfyui_flux_file_is_the_same_model(tmp_path: Path):
    keys = {f"model.diffusion_model.{name}": shape for name, shape in real_keys("flux1-dev.bfl").items()}
    source = open_source(sparse_file(tmp_path / "comfy.safetensors", keys))
    converted, _ = convert_names(
        FLUX1, {n: MemoryTensor(torch.empty(s, device="meta")) for n, s in real_keys("flux1-dev.bfl").items()}
    )
    assert {name: entry.shape for name, entry in source.tensors.items()} == {
        n: e.shape for n, e in converted.items()
    }


def test_sdxl_is_planned_from_the_header_of_an_ldm_file(tmp_path: Path):
    keys = real_keys("sdxl-unet.ldm")
    beside = {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,)}
    path = sparse_file(tmp_path / "sdxl.safetensors", {**keys, **beside})
    source = open_source(path)
    assert (source.component, source.config["cross_attention_dim"]) == ("unet", 2048)
    assert "conditioner (1 tensor)" in source.warnings[0]
    family, _, _, parameters = planned(path)
    assert (family, parameters) == ("sdxl", 2567463684)
