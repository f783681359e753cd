"""Tencent's names: HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1, and what ComfyUI calls the same layers.

HunyuanVideo has one matrix for queries, keys and values; the other two have three, which ComfyUI's files join again.
"""

from __future__ import annotations

from svdq_cli.source.names import Naming, Rule, fused, renamed, swapped
from svdq_cli.source.original_names.table import also_called, in_stack, table

_QKV = ("to_q", "to_k", "to_v")
_STREAMS = (
    ("img", _QKV, "to_out.0", "norm_", "norm1", "ff"),
    (
        "txt",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "to_add_out",
        "norm_added_",
        "norm1_context",
        "ff_context",
    ),
)


def _double_block() -> tuple[Rule, ...]:
    """A block but for its queries, keys and values."""
    rules: list[Rule] = []
    for stream, _, out, norm, modulation, mlp in _STREAMS:
        rules += [
            renamed(f"{stream}_attn_proj", f"attn.{out}"),
            *(renamed(f"{stream}_attn_{x}_norm", f"attn.{norm}{x}") for x in "qk"),
            renamed(f"{stream}_mod.linear", f"{modulation}.linear"),
            renamed(f"{stream}_mlp.fc1", f"{mlp}.net.0.proj"),
            renamed(f"{stream}_mlp.fc2", f"{mlp}.net.2"),
        ]
    return tuple(rules)


_PROJECTIONS = {stream: tuple(f"attn.{name}" for name in names) for stream, names, *_ in _STREAMS}
_SINGLE_PROJECTIONS = (*_PROJECTIONS["img"], "proj_mlp")
_DOUBLE, _SINGLE = ("double_blocks", "transformer_blocks"), ("single_blocks", "single_transformer_blocks")
_SINGLE_BLOCK = in_stack(
    *_SINGLE,
    (
        renamed("modulation.linear", "norm.linear"),
        *(renamed(f"{x}_norm", f"attn.norm_{x}") for x in "qk"),
    ),
)
_JOINED_DOUBLE = in_stack(
    *_DOUBLE, tuple(fused(f"{stream}_attn_qkv", *names) for stream, names in _PROJECTIONS.items())
)
_SPLIT_DOUBLE = in_stack(
    *_DOUBLE,
    tuple(
        renamed(f"{stream}_attn_{x}", name)
        for stream, names in _PROJECTIONS.items()
        for x, name in zip("qkv", names, strict=True)
    ),
)
_JOINED_SINGLE = in_stack(
    *_SINGLE,
    (
        # the MLP of a single block is four times as wide as its attention
        fused("linear1", *_SINGLE_PROJECTIONS, split=(1, 1, 1, 4)),
        renamed("linear2", "proj_out"),
    ),
)
_SPLIT_SINGLE = in_stack(
    *_SINGLE,
    (
        *(
            renamed(f"linear1_{x}", name)
            for x, name in zip(("q", "k", "v", "mlp"), _SINGLE_PROJECTIONS, strict=True)
        ),
        renamed("linear2.fc", "proj_out"),
    ),
)
_REFINER_BLOCK = (
    renamed("norm1", "norm1"),
    renamed("norm2", "norm2"),
    fused("self_attn_qkv", *_PROJECTIONS["img"]),
    renamed("self_attn_proj", "attn.to_out.0"),
    renamed("mlp.fc1", "ff.net.0.proj"),
    renamed("mlp.fc2", "ff.net.2"),
    renamed("adaLN_modulation.1", "norm_out.linear"),
)


def _embedder(original: str, target: str) -> tuple[Rule, ...]:
    return (renamed(f"{original}.0", f"{target}.linear_1"), renamed(f"{original}.2", f"{target}.linear_2"))


_TEXT = "context_embedder"
_SHARED = (
    *in_stack(*_DOUBLE, _double_block()),
    *in_stack(
        "txt_in.individual_token_refiner.blocks", f"{_TEXT}.token_refiner.refiner_blocks", _REFINER_BLOCK
    ),
    *_embedder("txt_in.t_embedder.mlp", f"{_TEXT}.time_text_embed.timestep_embedder"),
    *(
        renamed(f"txt_in.c_embedder.{x}", f"{_TEXT}.time_text_embed.text_embedder.{x}")
        for x in ("linear_1", "linear_2")
    ),
    renamed("txt_in.input_embedder", f"{_TEXT}.proj_in"),
    renamed("img_in.proj", "x_embedder.proj"),
    renamed("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
_BYT5 = (
    renamed("byt5_in.layernorm", "context_embedder_2.norm"),
    *(renamed(f"byt5_in.fc{number}", f"context_embedder_2.linear_{number}") for number in (1, 2, 3)),
)
_COMFYUI = (
    ("txt_in.t_embedder.mlp.0", "txt_in.t_embedder.in_layer"),
    ("txt_in.t_embedder.mlp.2", "txt_in.t_embedder.out_layer"),
    ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    ("_in.mlp.0", "_in.in_layer"),
    ("_in.mlp.2", "_in.out_layer"),
    ("_mod.linear", "_mod.lin"),
    (".modulation.linear", ".modulation.lin"),
    ("_attn_qkv", "_attn.qkv"),
    ("_attn_proj", "_attn.proj"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("_attn_q_norm", "_attn.norm.query_norm"),
    ("_attn_k_norm", "_attn.norm.key_norm"),
    (".q_norm", ".norm.query_norm"),
    (".k_norm", ".norm.key_norm"),
)
_NORM_SCALES = {"scale": "weight"}

HUNYUAN_VIDEO = Naming(
    name="original (HunyuanVideo) names",
    model_class="HunyuanVideoTransformer3DModel",
    relatives=frozenset({"HunyuanVideoFramepackTransformer3DModel"}),
    signature=frozenset({"double_blocks.0.img_attn_qkv.weight", "single_blocks.0.linear1.weight"}),
    rules=table(
        *also_called(
            _COMFYUI,
            *_SHARED,
            *_JOINED_DOUBLE,
            *_SINGLE_BLOCK,
            *_JOINED_SINGLE,
            *_embedder("time_in.mlp", "time_text_embed.timestep_embedder"),
            *_embedder("guidance_in.mlp", "time_text_embed.guidance_embedder"),
            renamed("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
            renamed("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
        ),
        # Framepack's, which have their own names in both
        *(renamed(f"{name}.*", f"{name}.*") for name in ("clean_x_embedder", "image_projection")),
    ),
    suffixes=_NORM_SCALES,
)

HUNYUAN_VIDEO_15 = Naming(
    name="original (HunyuanVideo 1.5) names",
    model_class="HunyuanVideo15Transformer3DModel",
    signature=frozenset({"double_blocks.0.img_attn_q.weight", "vision_in.proj.1.weight"}),
    rules=table(
        *also_called(
            _COMFYUI,
            *_SHARED,
            *_SPLIT_DOUBLE,
            *_JOINED_DOUBLE,
            *_BYT5,
            *_embedder("time_in.mlp", "time_embed.timestep_embedder"),
            *_embedder("time_r_in.mlp", "time_embed.timestep_embedder_r"),
        ),
        renamed("vision_in.proj.0", "image_embedder.norm_in"),
        renamed("vision_in.proj.1", "image_embedder.linear_1"),
        renamed("vision_in.proj.3", "image_embedder.linear_2"),
        renamed("vision_in.proj.4", "image_embedder.norm_out"),
        renamed("cond_type_embedding", "cond_type_embed"),
    ),
    suffixes=_NORM_SCALES,
    published="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
)

HUNYUAN_IMAGE = Naming(
    name="original (HunyuanImage) names",
    model_class="HunyuanImageTransformer2DModel",
    signature=frozenset({"double_blocks.0.img_attn_q.weight", "single_blocks.0.linear1_q.weight"}),
    rules=table(
        *also_called(
            _COMFYUI,
            *_SHARED,
            *_SPLIT_DOUBLE,
            *_JOINED_DOUBLE,
            *_SINGLE_BLOCK,
            *_SPLIT_SINGLE,
            *_JOINED_SINGLE,
            *_BYT5,
            *_embedder("time_in.mlp", "time_guidance_embed.timestep_embedder"),
            *_embedder("time_r_in.mlp", "time_guidance_embed.timestep_embedder_r"),
            *_embedder("guidance_in.mlp", "time_guidance_embed.guidance_embedder"),
        ),
    ),
    suffixes=_NORM_SCALES,
    published="hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
)
