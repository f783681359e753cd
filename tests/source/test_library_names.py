"""Names that svdq has no table for are what diffusers' own conversion makes of them, at any width."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import models
from diffusers.loaders import single_file_model
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.source import open_source, source_digest
from svdq_cli.source.configs import class_of_names
from svdq_cli.source.library_names import convert_by_library, published_pipeline
from svdq_cli.source.original_names import naming_of
from svdq_cli.source.traced import RowsOf, fit_splits, stand_ins
from tests.source.originals import MemoryTensor, original_state, row_numbers

Replacements = Sequence[tuple[str, str]]  # patterns over diffusers' names -> what the original has there
Original = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def renamed(state: Mapping[str, Tensor], replacements: Replacements) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        old = name
        for pattern, original in replacements:
            old = re.sub(pattern, original, old)
        found[old] = tensor
    assert len(found) == len(state)
    return found


def fused(tensors: dict[str, Tensor], part: str, parts: Sequence[str]) -> dict[str, Tensor]:
    """Layers that the original has as one: `part` in a name stands for all of `parts`."""
    found = dict(tensors)
    for name in tensors:
        if f".{parts[0]}." in name:
            names = [name.replace(f".{parts[0]}.", f".{other}.") for other in parts]
            found[name.replace(f".{parts[0]}.", f".{part}.")] = torch.cat([found.pop(n) for n in names])
    return found


def halves_swapped(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    return {
        name: torch.cat(tensor.chunk(2)[::-1]) if name.startswith(layer) else tensor
        for name, tensor in tensors.items()
    }


def ltx(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(
        state,
        [
            (r"^proj_in", "patchify_proj"),
            ("time_embed", "adaln_single"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        ],
    )


def lumina2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = fused(dict(state), "qkv", ("to_q", "to_k", "to_v"))
    return renamed(
        tensors,
        [
            (r"^time_caption_embed\.caption_embedder", "cap_embedder"),
            (r"^time_caption_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
            (r"^time_caption_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
            (r"^norm_out\.linear_1", "final_layer.adaLN_modulation.1"),
            (r"^norm_out\.linear_2", "final_layer.linear"),
            (r"\.norm1\.linear", ".adaLN_modulation.1"),
            (r"\.norm1\.norm", ".attention_norm1"),
            (r"\.norm([12])\.", r".attention_norm\1."),
            (r"\.attn\.to_out\.0\.", ".attention.out."),
            (r"\.attn\.norm_([qk])", r".attention.\1_norm"),
            (r"\.attn\.", ".attention."),
            (r"feed_forward\.linear_", "feed_forward.w"),
        ],
    ) | {"norm_final.weight": torch.zeros(1)}


def hunyuan(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = halves_swapped(dict(state), "norm_out.linear")
    refiner = {name: tensor for name, tensor in tensors.items() if name.startswith("context_embedder.")}
    double = {name: tensor for name, tensor in tensors.items() if name.startswith("transformer_blocks.")}
    single = {name: tensor for name, tensor in tensors.items() if name.startswith("single_transformer")}
    ends = {name: t for name, t in tensors.items() if name not in refiner | double | single}
    refiner = renamed(
        fused(refiner, "self_attn_qkv", ("to_q", "to_k", "to_v")),
        [
            (r"^context_embedder\.", "txt_in."),
            (r"token_refiner\.refiner_blocks", "individual_token_refiner.blocks"),
            (r"\.norm_out\.linear", ".adaLN_modulation.1"),
            (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
            (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
            (r"time_text_embed\.text_embedder", "c_embedder"),
            (r"\.proj_in\.", ".input_embedder."),
            (r"\.attn\.self_attn_qkv", ".self_attn_qkv"),
            (r"\.attn\.to_out\.0", ".self_attn_proj"),
            (r"\.ff\.net\.0\.proj", ".mlp.fc1"),
            (r"\.ff\.net\.2", ".mlp.fc2"),
        ],
    )
    double = fused(double, "img_attn_qkv", ("to_q", "to_k", "to_v"))
    double = renamed(
        fused(double, "txt_attn_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        [
            (r"^transformer_blocks", "double_blocks"),
            (r"\.attn\.(img|txt)_attn_qkv", r".\1_attn_qkv"),
            (r"\.attn\.norm_([qk])", r".img_attn_\1_norm"),
            (r"\.attn\.norm_added_([qk])", r".txt_attn_\1_norm"),
            (r"\.attn\.to_out\.0", ".img_attn_proj"),
            (r"\.attn\.to_add_out", ".txt_attn_proj"),
            (r"\.norm1\.linear", ".img_mod.linear"),
            (r"\.norm1_context\.linear", ".txt_mod.linear"),
            (r"\.ff\.net\.0\.proj", ".img_mlp.fc1"),
            (r"\.ff\.net\.2", ".img_mlp.fc2"),
            (r"\.ff_context\.net\.0\.proj", ".txt_mlp.fc1"),
            (r"\.ff_context\.net\.2", ".txt_mlp.fc2"),
        ],
    )
    single = renamed(single, [(r"\.proj_mlp\.", ".attn.proj_mlp.")])
    single = renamed(
        fused(single, "linear1", ("to_q", "to_k", "to_v", "proj_mlp")),
        [
            (r"^single_transformer_blocks", "single_blocks"),
            (r"\.attn\.linear1", ".linear1"),
            (r"\.attn\.norm_([qk])", r".\1_norm"),
            (r"\.norm\.linear", ".modulation.linear"),
            (r"\.proj_out", ".linear2"),
        ],
    )
    ends = renamed(
        ends,
        [
            (r"^x_embedder", "img_in"),
            (r"^proj_out", "final_layer.linear"),
            (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
            (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.mlp.0"),
            (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.mlp.2"),
            (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.mlp.0"),
            (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.mlp.2"),
            (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
            (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
        ],
    )
    return {**ends, **refiner, **double, **single}


def auraflow(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(
        halves_swapped(dict(state), "norm_out.linear"),
        [
            (r"^time_step_proj\.linear_1", "t_embedder.mlp.0"),
            (r"^time_step_proj\.linear_2", "t_embedder.mlp.2"),
            (r"^context_embedder", "cond_seq_linear"),
            (r"^norm_out\.linear", "modF.1"),
            (r"^proj_out", "final_linear"),
            (r"^pos_embed\.pos_embed", "positional_encoding"),
            (r"^pos_embed\.proj", "init_x_linear"),
            (r"^joint_transformer_blocks", "double_layers"),
            (r"^single_transformer_blocks", "single_layers"),
            (r"^(double.*)\.norm1\.linear", r"\1.modX.1"),
            (r"^(double.*)\.norm1_context\.linear", r"\1.modC.1"),
            (r"^(single.*)\.norm1\.linear", r"\1.modCX.1"),
            (r"^(double.*)\.ff\.", r"\1.mlpX."),
            (r"^(double.*)\.ff_context\.", r"\1.mlpC."),
            (r"^(single.*)\.ff\.", r"\1.mlp."),
            (r"mlp(.?)\.linear_", r"mlp\1.c_fc"),
            (r"mlp(.?)\.out_projection", r"mlp\1.c_proj"),
            (r"^(double.*)\.attn\.to_([qkv])\.", r"\1.attn.w2\2."),
            (r"^(double.*)\.attn\.to_out\.0", r"\1.attn.w2o"),
            (r"^(double.*)\.attn\.add_([qkv])_proj", r"\1.attn.w1\2"),
            (r"^(double.*)\.attn\.to_add_out", r"\1.attn.w1o"),
            (r"^(single.*)\.attn\.to_([qkv])\.", r"\1.attn.w1\2."),
            (r"^(single.*)\.attn\.to_out\.0", r"\1.attn.w1o"),
        ],
    )


def cosmos2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    original = renamed(
        state,
        [
            (r"^", "net."),
            ("transformer_blocks", "blocks"),
            ("patch_embed.proj", "x_embedder.proj.1"),
            ("time_embed.t_embedder", "t_embedder.1"),
            ("time_embed.norm", "t_embedding_norm"),
            (r"norm1\.linear_(\d)", r"adaln_modulation_self_attn.\1"),
            (r"norm2\.linear_(\d)", r"adaln_modulation_cross_attn.\1"),
            (r"norm3\.linear_(\d)", r"adaln_modulation_mlp.\1"),
            (r"norm_out\.linear_(\d)", r"final_layer.adaln_modulation.\1"),
            (r"net\.proj_out", "net.final_layer.linear"),
            (r"attn1\.", "self_attn."),
            (r"attn2\.", "cross_attn."),
            (r"norm_([qk])", r"\1_norm"),
            (r"to_([qkv])\.", r"\1_proj."),
            (r"to_out\.0", "output_proj"),
            (r"ff\.net\.0\.proj", "mlp.layer1"),
            (r"ff\.net\.2", "mlp.layer2"),
        ],
    )
    return original | {
        "net.pos_embedder.dim_spatial_range": torch.zeros(3),
        "net.accum_iteration": torch.zeros(1),
    }


TINY: dict[str, tuple[str, dict[str, Any], Original]] = {
    "LTX-Video": (
        "LTXVideoTransformer3DModel",
        {
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "caption_channels": 32,
        },
        ltx,
    ),
    "Lumina 2": (
        "Lumina2Transformer2DModel",
        {
            "num_layers": 1,
            "num_refiner_layers": 1,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "axes_dim_rope": (16, 8, 8),
            "cap_feat_dim": 32,
        },
        lumina2,
    ),
    "HunyuanVideo": (
        "HunyuanVideoTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 32,
            "pooled_projection_dim": 32,
            "rope_axes_dim": (16, 24, 24),
        },
        hunyuan,
    ),
    "AuraFlow": (
        "AuraFlowTransformer2DModel",
        {
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 128,
            "pos_embed_max_size": 16,
        },
        auraflow,
    ),
    "Cosmos 2": (
        "CosmosTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_layers": 1,
            "text_embed_dim": 32,
            "adaln_lora_dim": 16,
            "extra_pos_embed_type": None,
        },
        cosmos2,
    ),
}


def state_of(class_name: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every number of every tensor is another one."""
    with torch.device("meta"):
        model = getattr(models, class_name)(**config)
    state: dict[str, Tensor] = {}
    first = 0
    for name, tensor in model.state_dict().items():
        state[name] = torch.arange(first, first + tensor.numel(), dtype=torch.float32).reshape(tensor.shape)
        first += tensor.numel()
    return state


def pipeline_of(folder: Path, class_name: str, config: Mapping[str, Any], state: dict[str, Tensor]) -> Path:
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", class_name]}))
    said = json.dumps({"_class_name": class_name, **config})
    (folder / "transformer/config.json").write_text(said)
    save_file(state, folder / "transformer/diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "comfyui"])
@pytest.mark.parametrize("name", TINY)
def test_a_file_of_original_names_is_the_same_model_as_its_folder(tmp_path: Path, name: str, prefix: str):
    class_name, config, original = TINY[name]
    state = state_of(class_name, config)
    base = pipeline_of(tmp_path / "base", class_name, config, state)
    stored = {prefix + key: tensor.contiguous() for key, tensor in original(state).items()}
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(tmp_path / "model.safetensors", base=base)
    assert "original names" in source.kind
    assert source_digest(source) == source_digest(open_source(base))


@pytest.mark.parametrize(
    ("name", "config", "convert"),
    [
        (
            "HunyuanVideo",
            {"num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1},
            theirs.convert_hunyuan_video_transformer_to_diffusers,
        ),
        ("Lumina 2", {"num_layers": 1, "num_refiner_layers": 2}, theirs.convert_lumina2_to_diffusers),
    ],
)
def test_at_the_published_widths_it_is_what_diffusers_makes_of_the_tensors(
    name: str, config: dict[str, Any], convert: Callable[..., Mapping[str, Tensor]]
):
    class_name, _, original = TINY[name]
    with torch.device("meta"):
        shapes = {k: tuple(t.shape) for k, t in getattr(models, class_name)(**config).state_dict().items()}
    stored = original(row_numbers(shapes))
    entries = {key: MemoryTensor(tensor) for key, tensor in stored.items()}
    mine = convert_by_library(class_name, config, entries, shapes)
    expected = convert(dict(stored))
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[key].read(), tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    ("class_name", "shapes"),
    [
        ("Krea2Transformer2DModel", {"blocks.0.mod.lin": (12,), "blocks.1.attn.wq.weight": (4, 6)}),
        (
            "MiniMaxH3Transformer3DModel",
            {"blocks.0.attn.qkv_proj.weight": (12, 4), "blocks.0.mlp.fc1.weight": (8, 4)},
        ),
        ("QwenImage21Transformer2DModel", {"transformer_blocks.0.img_mlp.gate_up.weight": (8, 4)}),
        (
            "WanAnimateTransformer3DModel",
            {
                "motion_encoder.enc.net_app.convs.0.1.bias": (1, 6, 1, 1),
                "face_adapter.fuser_blocks.0.linear1_kv.weight": (8, 4),
                "blocks.0.self_attn.q.weight": (4, 4),
            },
        ),
    ],
)
def test_reshaped_reordered_and_sliced_tensors_are_followed(
    class_name: str, shapes: dict[str, tuple[int, ...]]
):
    stored = {key: torch.rand(shape) for key, shape in shapes.items()}
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"]
    config = {"num_attention_heads": 1, "attention_head_dim": 4}
    expected: dict[str, Tensor] = convert(checkpoint=dict(stored), config=config)
    entries = {key: MemoryTensor(tensor) for key, tensor in stored.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    mine = convert_by_library(class_name, config, entries, wanted)
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert mine[name].shape == tuple(tensor.shape)
        assert torch.equal(mine[name].read(), tensor)


@pytest.mark.parametrize(
    "operation",
    [
        lambda tensor: tensor.T,
        lambda tensor: tensor + 1,
        lambda tensor: torch.chunk(tensor, 2, dim=1),
        lambda tensor: torch.cat([tensor, tensor], dim=1),
        lambda tensor: torch.flip(tensor, (0,)),
        lambda tensor: tensor[:, 0],
        lambda tensor: tensor[::2],
        lambda tensor: tensor.reshape(2, -1).chunk(2),
        lambda tensor: tensor.reshape(5, -1),
        lambda tensor: tensor.chunk(3),
    ],
)
def test_what_does_not_keep_rows_whole_is_an_error_and_no_guess(operation: Callable[[Any], object]):
    with pytest.raises((TypeError, ValueError, AttributeError)):
        operation(stand_ins({"weight": (4, 6)})["weight"])


def test_a_split_that_fits_no_tensor_takes_the_sizes_of_the_model():
    """diffusers' conversion of Lumina 2 knows one width of queries and keys."""
    whole: Any = stand_ins({"qkv": (8, 2)})["qkv"]
    split: Any = torch.split
    q, k, v = split(whole, [2304, 768, 768], dim=0)
    results = {"q": q, "k": k, "v": v}
    fit_splits(results, {"q": (4, 2), "k": (2, 2), "v": (2, 2)})
    assert [part.rows for part in (q, k, v)] == [
        (RowsOf("qkv", 0, 4),),
        (RowsOf("qkv", 4, 6),),
        (RowsOf("qkv", 6, 8),),
    ]
    q, k, v = split(whole, [2304, 768, 768], dim=0)
    fit_splits({"q": q, "k": k, "v": v}, {"q": (4, 2), "k": (2, 2), "v": (3, 2)})
    assert q.rows is None


def test_without_a_base_the_published_pipeline_is_named(tmp_path: Path):
    class_name, config, original = TINY["HunyuanVideo"]
    save_file(original(state_of(class_name, config)), tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        open_source(tmp_path / "model.safetensors")
    assert error.value.kind == "needs-base"
    assert "--base hunyuanvideo-community/HunyuanVideo" in str(error.value.hint)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "comfyui"])
def test_ltx_2_is_not_taken_for_ltx_video(prefix: str):
    names = (
        "patchify_proj.weight",
        "transformer_blocks.47.scale_shift_table",
        "av_ca_a2v_gate_adaln_single.emb.timestep_embedder.linear_1.weight",
    )
    stored = {prefix + name: MemoryTensor(torch.zeros(1)) for name in names}
    assert published_pipeline(stored) == "Lightricks/LTX-2"


def test_names_that_nobody_reads_are_told_so(tmp_path: Path):
    class_name, config, _ = TINY["Lumina 2"]
    state = state_of(class_name, config)
    base = pipeline_of(tmp_path / "base", class_name, config, state)
    save_file({f"other.{i}.weight": t for i, t in enumerate(state.values())}, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        open_source(tmp_path / "model.safetensors", base=base)
    assert error.value.kind == "unread-names"
    assert "diffusers folder" in str(error.value.hint)


def test_a_class_whose_names_begin_as_a_known_ones_do_is_what_its_base_says(tmp_path: Path):
    """Bria's transformer has every name that FLUX.1 is told by."""
    config = {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "axes_dims_rope": [8, 12, 12],
    }
    state = state_of("BriaTransformer2DModel", config)
    known = class_of_names(state)
    assert known is not None
    assert known.model_class == "FluxTransformer2DModel"
    base = pipeline_of(tmp_path / "base", "BriaTransformer2DModel", config, state)
    save_file(state, tmp_path / "model.safetensors")
    source = open_source(tmp_path / "model.safetensors", base=base)
    assert source_digest(source) == source_digest(open_source(base))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "comfyui"])
@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("HunyuanVideo15Transformer3DModel", {"text_embed_2_dim": 32, "image_embed_dim": 32}),
        ("HunyuanImageTransformer2DModel", {"text_embed_2_dim": 32, "num_single_layers": 1}),
        ("LTX2VideoTransformer3DModel", {"cross_attn_mod": True, "audio_cross_attn_mod": True}),
    ],
)
def test_where_diffusers_converts_nothing_or_less_svdqs_table_does(
    tmp_path: Path, class_name: str, config: dict[str, Any], prefix: str
):
    """diffusers has no converter for the former two, and none for LTX-2.3's modulation of text."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 1}
    hunyuan = {"num_refiner_layers": 1, "text_embed_dim": 32}
    ltx = {"audio_num_attention_heads": 2, "cross_attention_dim": 128, "caption_channels": 32}
    config = {**heads, **(hunyuan if "Hunyuan" in class_name else ltx), **config}
    state = state_of(class_name, config)
    base = pipeline_of(tmp_path / "base", class_name, config, state)
    naming = naming_of(class_name)
    assert naming is not None
    original = original_state(naming, state, lambda _: False)
    stored = {prefix + key: tensor.contiguous() for key, tensor in original.items()}
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(tmp_path / "model.safetensors", base=base)
    assert source_digest(source) == source_digest(open_source(base))
    if naming.published:
        with pytest.raises(InputError) as error:
            open_source(tmp_path / "model.safetensors")
        assert error.value.kind == "needs-base"
        assert f"--base {naming.published}" in str(error.value.hint)


def test_hunyuan_video_under_comfyuis_names_is_read(tmp_path: Path):
    """Which diffusers does not convert: `img_attn.qkv`, `img_mlp.0`, norms with scales."""
    class_name, config, original = TINY["HunyuanVideo"]
    state = state_of(class_name, config)
    base = pipeline_of(tmp_path / "base", class_name, config, state)
    replacements = [
        (r"(txt_in\.t_embedder|time_in|guidance_in)\.mlp\.0\.", r"\1.in_layer."),
        (r"(txt_in\.t_embedder|time_in|guidance_in)\.mlp\.2\.", r"\1.out_layer."),
        (r"c_embedder\.linear_1", "c_embedder.in_layer"),
        (r"c_embedder\.linear_2", "c_embedder.out_layer"),
        (r"_attn_([qk])_norm\.weight", r"_attn.norm.\1_norm.weight"),
        (r"\.([qk])_norm\.weight", r".norm.\1_norm.weight"),
        (r"norm\.norm", "norm"),
        (r"q_norm\.weight", "query_norm.scale"),
        (r"k_norm\.weight", "key_norm.scale"),
        (r"_attn_(qkv|proj)", r"_attn.\1"),
        (r"mlp\.fc1", "mlp.0"),
        (r"mlp\.fc2", "mlp.2"),
        (r"_mod\.linear", "_mod.lin"),
        (r"modulation\.linear", "modulation.lin"),
    ]
    stored = renamed(original(state), replacements)
    save_file({f"model.{k}": t.contiguous() for k, t in stored.items()}, tmp_path / "model.safetensors")
    source = open_source(tmp_path / "model.safetensors", base=base)
    assert source_digest(source) == source_digest(open_source(base))
