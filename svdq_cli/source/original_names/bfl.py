"""Black Forest Labs' names: FLUX.1, FLUX.2, FLUX.3, and Chroma, which was made from FLUX.1."""

from __future__ import annotations

from svdq_cli.source.names import Naming, Rule, fused, renamed, swapped
from svdq_cli.source.original_names.table import in_stack, table

_BFL_DOUBLE = (
    ("img_attn", "attn.", ("to_q", "to_k", "to_v"), "norm_", "to_out.0"),
    ("txt_attn", "attn.", ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_", "to_add_out"),
)


def _bfl_attention() -> tuple[Rule, ...]:
    """The attention of a double block, image and text stream: the same in FLUX.1 and FLUX.2."""
    rules: list[Rule] = []
    for stream, prefix, projections, norm, out in _BFL_DOUBLE:
        original, target = f"double_blocks.{{}}.{stream}", f"transformer_blocks.{{}}.{prefix}"
        rules += [
            fused(f"{original}.qkv", *(target + name for name in projections)),
            renamed(f"{original}.norm.query_norm", f"{target}{norm}q"),
            renamed(f"{original}.norm.key_norm", f"{target}{norm}k"),
            renamed(f"{original}.proj", target + out),
        ]
    return tuple(rules)


def _bfl_embedder(original: str, target: str) -> tuple[Rule, ...]:
    return (
        renamed(f"{original}.in_layer", f"{target}.linear_1"),
        renamed(f"{original}.out_layer", f"{target}.linear_2"),
    )


_BFL_INPUT_AND_OUTPUT = (
    renamed("img_in", "x_embedder"),
    renamed("txt_in", "context_embedder"),
    renamed("final_layer.linear", "proj_out"),
)
_BFL_ENDS = (*_BFL_INPUT_AND_OUTPUT, swapped("final_layer.adaLN_modulation.1", "norm_out.linear"))
_BFL_SINGLE_NORMS = (
    renamed("single_blocks.{}.norm.query_norm", "single_transformer_blocks.{}.attn.norm_q"),
    renamed("single_blocks.{}.norm.key_norm", "single_transformer_blocks.{}.attn.norm_k"),
)

# A block of FLUX.1 but for its modulation, which Chroma has not
_FLUX1_BLOCKS = (
    *_bfl_attention(),
    renamed("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
    renamed("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
    renamed("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
    renamed("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
    *_BFL_SINGLE_NORMS,
    fused(
        "single_blocks.{}.linear1",
        *(
            f"single_transformer_blocks.{{}}.{name}"
            for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
        split=(1, 1, 1, 4),  # the MLP of a single block is four times as wide as its attention
    ),
    renamed("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
)

FLUX1 = Naming(
    name="original (BFL) names",
    model_class="FluxTransformer2DModel",
    signature=frozenset({"double_blocks.0.img_mod.lin.weight", "single_blocks.0.modulation.lin.weight"}),
    rules=table(
        *_BFL_ENDS,
        *_bfl_embedder("time_in", "time_text_embed.timestep_embedder"),
        *_bfl_embedder("vector_in", "time_text_embed.text_embedder"),
        *_bfl_embedder("guidance_in", "time_text_embed.guidance_embedder"),
        *_FLUX1_BLOCKS,
        renamed("double_blocks.{}.img_mod.lin", "transformer_blocks.{}.norm1.linear"),
        renamed("double_blocks.{}.txt_mod.lin", "transformer_blocks.{}.norm1_context.linear"),
        renamed("single_blocks.{}.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
    ),
    suffixes={"scale": "weight"},
)

FLUX2 = Naming(
    name="original (BFL) names",
    model_class="Flux2Transformer2DModel",
    signature=frozenset({"double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight"}),
    rules=table(
        *_BFL_ENDS,
        *_bfl_embedder("time_in", "time_guidance_embed.timestep_embedder"),
        *_bfl_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
        *(
            renamed(f"{name}.lin", f"{name}.linear")
            for name in (
                "double_stream_modulation_img",
                "double_stream_modulation_txt",
                "single_stream_modulation",
            )
        ),
        *_bfl_attention(),
        renamed("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.linear_in"),
        renamed("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.linear_out"),
        renamed("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.linear_in"),
        renamed("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.linear_out"),
        *_BFL_SINGLE_NORMS,
        renamed("single_blocks.{}.linear1", "single_transformer_blocks.{}.attn.to_qkv_mlp_proj"),
        renamed("single_blocks.{}.linear2", "single_transformer_blocks.{}.attn.to_out"),
    ),
    suffixes={"scale": "weight"},
)

CHROMA = Naming(
    name="original (Chroma) names",
    model_class="ChromaTransformer2DModel",
    signature=frozenset({"distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"}),
    rules=table(
        *_BFL_INPUT_AND_OUTPUT,
        *_FLUX1_BLOCKS,
        *(renamed(name, name) for name in (f"distilled_guidance_layer.{end}_proj" for end in ("in", "out"))),
        *_bfl_embedder("distilled_guidance_layer.layers.{}", "distilled_guidance_layer.layers.{}"),
        renamed("distilled_guidance_layer.norms.{}", "distilled_guidance_layer.norms.{}"),
    ),
    suffixes={"scale": "weight"},
)

_FLUX3_BLOCK = (
    *(renamed(f"{x}_proj", f"attn.to_{x}") for x in "qkv"),
    renamed("attn_out", "attn.to_out.0"),
    renamed("norm.query_norm", "attn.norm_q"),
    renamed("norm.key_norm", "attn.norm_k"),
    renamed("mlp_in", "ff.linear_in"),
    renamed("mlp_out", "ff.linear_out"),
)
# what FLUX.3 generates, and the images that it reads
_FLUX3_MODES = ("image", "image_cond")
_FLUX3_STREAMS = (*_FLUX3_MODES, "txt")

FLUX3 = Naming(
    name="original (BFL) names",
    model_class="Flux3Transformer2DModel",
    signature=frozenset({"content_mode_blocks.image.0.q_proj.weight", "single_blocks.0.q_proj.weight"}),
    rules=table(
        *in_stack("single_blocks", "single_transformer_blocks", _FLUX3_BLOCK),
        *in_stack("txt_mode_blocks", "txt_mode_blocks", _FLUX3_BLOCK),
        *(
            rule
            for mode in _FLUX3_MODES
            for rule in in_stack(f"content_mode_blocks.{mode}", f"mode_blocks.{mode}", _FLUX3_BLOCK)
        ),
        *(renamed(f"emb_in.{mode}", f"x_embedders.{mode}") for mode in _FLUX3_MODES),
        *(
            renamed(f"{stage}_stream_modulations.{stream}.lin", f"{stage}_stream_modulations.{stream}.linear")
            for stage in ("early", "single")
            for stream in _FLUX3_STREAMS
        ),
        renamed("txt_in", "context_embedder"),
        *_bfl_embedder("time_in", "timestep_embedder"),
        *_bfl_embedder("ref_time_in", "target_timestep_embedder"),
        renamed("final_layer.image.linear", "proj_out"),
        swapped("final_layer.image.adaLN_modulation.1", "norm_out.linear"),
    ),
    suffixes={"scale": "weight"},
)
