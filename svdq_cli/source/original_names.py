"""The original names of the models that people have as single files, each as rules onto diffusers' names.

The rules were made from the names and shapes of published checkpoints; a test holds them against diffusers' own
single-file converters at full size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from svdq_cli.source.names import Naming, Rule, block_numbers, expanded, fused, numbered, renamed, swapped


def _table(*rules: Rule) -> Callable[[Sequence[str]], tuple[Rule, ...]]:
    return partial(expanded, rules)


def _in_stacks(stacks: Sequence[str], rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The same rules below each stack of blocks."""
    return tuple(
        replace(
            rule,
            original=f"{stack}.{{}}.{rule.original}",
            targets=tuple(f"{stack}.{{}}.{t}" for t in rule.targets),
        )
        for stack in stacks
        for rule in rules
    )


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


_BFL_ENDS = (
    renamed("img_in", "x_embedder"),
    renamed("txt_in", "context_embedder"),
    renamed("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
_BFL_SINGLE_NORMS = (
    renamed("single_blocks.{}.norm.query_norm", "single_transformer_blocks.{}.attn.norm_q"),
    renamed("single_blocks.{}.norm.key_norm", "single_transformer_blocks.{}.attn.norm_k"),
)

FLUX1 = Naming(
    name="original (BFL) names",
    model_class="FluxTransformer2DModel",
    signature=frozenset({"double_blocks.0.img_mod.lin.weight", "single_blocks.0.modulation.lin.weight"}),
    rules=_table(
        *_BFL_ENDS,
        *_bfl_embedder("time_in", "time_text_embed.timestep_embedder"),
        *_bfl_embedder("vector_in", "time_text_embed.text_embedder"),
        *_bfl_embedder("guidance_in", "time_text_embed.guidance_embedder"),
        *_bfl_attention(),
        renamed("double_blocks.{}.img_mod.lin", "transformer_blocks.{}.norm1.linear"),
        renamed("double_blocks.{}.txt_mod.lin", "transformer_blocks.{}.norm1_context.linear"),
        renamed("double_blocks.{}.img_mlp.0", "transformer_blocks.{}.ff.net.0.proj"),
        renamed("double_blocks.{}.img_mlp.2", "transformer_blocks.{}.ff.net.2"),
        renamed("double_blocks.{}.txt_mlp.0", "transformer_blocks.{}.ff_context.net.0.proj"),
        renamed("double_blocks.{}.txt_mlp.2", "transformer_blocks.{}.ff_context.net.2"),
        *_BFL_SINGLE_NORMS,
        renamed("single_blocks.{}.modulation.lin", "single_transformer_blocks.{}.norm.linear"),
        fused(
            "single_blocks.{}.linear1",
            *(
                f"single_transformer_blocks.{{}}.{name}"
                for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            ),
            split=(1, 1, 1, 4),  # the MLP of a single block is four times as wide as its attention
        ),
        renamed("single_blocks.{}.linear2", "single_transformer_blocks.{}.proj_out"),
    ),
    suffixes={"scale": "weight"},
)

FLUX2 = Naming(
    name="original (BFL) names",
    model_class="Flux2Transformer2DModel",
    signature=frozenset({"double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight"}),
    rules=_table(
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

_Z_IMAGE_STACKS = ("layers", "noise_refiner", "context_refiner")
Z_IMAGE = Naming(
    name="original (Z-Image) names",
    model_class="ZImageTransformer2DModel",
    signature=frozenset({"layers.0.attention.qkv.weight", "cap_embedder.1.weight", "x_pad_token"}),
    rules=_table(
        *_in_stacks(
            _Z_IMAGE_STACKS,
            (
                fused("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
                renamed("attention.out", "attention.to_out.0"),
                renamed("attention.q_norm", "attention.norm_q"),
                renamed("attention.k_norm", "attention.norm_k"),
                renamed("*", "*"),
            ),
        ),
        renamed("x_embedder", "all_x_embedder.2-1"),
        renamed("final_layer.*", "all_final_layer.2-1.*"),
        *(renamed(f"{name}.*", f"{name}.*") for name in ("t_embedder", "cap_embedder")),
        *(renamed(name, name) for name in ("x_pad_token", "cap_pad_token")),
    ),
    suffixes={},
    unused=frozenset({"norm_final.weight"}),
)

# PixArt's block, which SANA took over but for its MLP
_PIXART_BLOCK = (
    renamed("blocks.{}.scale_shift_table", "transformer_blocks.{}.scale_shift_table"),
    fused("blocks.{}.attn.qkv", *(f"transformer_blocks.{{}}.attn1.to_{x}" for x in "qkv")),
    renamed("blocks.{}.attn.proj", "transformer_blocks.{}.attn1.to_out.0"),
    renamed("blocks.{}.cross_attn.q_linear", "transformer_blocks.{}.attn2.to_q"),
    fused("blocks.{}.cross_attn.kv_linear", *(f"transformer_blocks.{{}}.attn2.to_{x}" for x in "kv")),
    renamed("blocks.{}.cross_attn.proj", "transformer_blocks.{}.attn2.to_out.0"),
    renamed("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    renamed("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    renamed("final_layer.linear", "proj_out"),
    renamed("final_layer.scale_shift_table", "scale_shift_table"),
)
_PIXART_UNUSED = frozenset(
    {"pos_embed", "y_embedder.y_embedding"}
)  # computed, and the empty prompt's embedding


def _pixart_embedder(original: str, target: str) -> tuple[Rule, ...]:
    return (
        renamed(f"{original}.mlp.0", f"{target}.linear_1"),
        renamed(f"{original}.mlp.2", f"{target}.linear_2"),
    )


PIXART = Naming(
    name="original (PixArt) names",
    model_class="PixArtTransformer2DModel",
    signature=frozenset(
        {"blocks.0.cross_attn.kv_linear.weight", "blocks.0.mlp.fc1.weight", "t_block.1.weight"}
    ),
    rules=_table(
        *_PIXART_BLOCK,
        renamed("x_embedder.proj", "pos_embed.proj"),
        *_pixart_embedder("t_embedder", "adaln_single.emb.timestep_embedder"),
        *_pixart_embedder("csize_embedder", "adaln_single.emb.resolution_embedder"),
        *_pixart_embedder("ar_embedder", "adaln_single.emb.aspect_ratio_embedder"),
        renamed("t_block.1", "adaln_single.linear"),
        renamed("blocks.{}.mlp.fc1", "transformer_blocks.{}.ff.net.0.proj"),
        renamed("blocks.{}.mlp.fc2", "transformer_blocks.{}.ff.net.2"),
    ),
    suffixes={},
    unused=_PIXART_UNUSED,
)

SANA = Naming(
    name="original (SANA) names",
    model_class="SanaTransformer2DModel",
    signature=frozenset({"blocks.0.cross_attn.q_linear.weight", "blocks.0.mlp.inverted_conv.conv.weight"}),
    rules=_table(
        *_PIXART_BLOCK,
        renamed("x_embedder.proj", "patch_embed.proj"),
        *_pixart_embedder("t_embedder", "time_embed.emb.timestep_embedder"),
        renamed("t_block.1", "time_embed.linear"),
        renamed("attention_y_norm", "caption_norm"),
        renamed("blocks.{}.mlp.inverted_conv.conv", "transformer_blocks.{}.ff.conv_inverted"),
        renamed("blocks.{}.mlp.depth_conv.conv", "transformer_blocks.{}.ff.conv_depth"),
        renamed("blocks.{}.mlp.point_conv.conv", "transformer_blocks.{}.ff.conv_point"),
    ),
    suffixes={},
    unused=_PIXART_UNUSED,
)

_SD3_STREAMS = (
    ("x_block", ("to_q", "to_k", "to_v"), "norm_", "to_out.0", "norm1", "ff"),
    (
        "context_block",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        "norm_added_",
        "to_add_out",
        "norm1_context",
        "ff_context",
    ),
)


def _sd3_block() -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for stream, projections, norm, out, modulation, mlp in _SD3_STREAMS:
        original, target = f"joint_blocks.{{}}.{stream}", "transformer_blocks.{}"
        rules += [
            fused(f"{original}.attn.qkv", *(f"{target}.attn.{name}" for name in projections)),
            renamed(f"{original}.attn.ln_q", f"{target}.attn.{norm}q"),
            renamed(f"{original}.attn.ln_k", f"{target}.attn.{norm}k"),
            renamed(f"{original}.attn.proj", f"{target}.attn.{out}"),
            renamed(f"{original}.adaLN_modulation.1", f"{target}.{modulation}.linear"),
            renamed(f"{original}.mlp.fc1", f"{target}.{mlp}.net.0.proj"),
            renamed(f"{original}.mlp.fc2", f"{target}.{mlp}.net.2"),
        ]
    second, target = "joint_blocks.{}.x_block.attn2", "transformer_blocks.{}.attn2"
    return (
        *rules,
        fused(f"{second}.qkv", *(f"{target}.to_{x}" for x in "qkv")),
        renamed(f"{second}.ln_q", f"{target}.norm_q"),
        renamed(f"{second}.ln_k", f"{target}.norm_k"),
        renamed(f"{second}.proj", f"{target}.to_out.0"),
    )


def _sd3_rules(keys: Sequence[str]) -> tuple[Rule, ...]:
    """The last block's text stream only feeds attention: its modulation is (shift, scale), which diffusers swaps."""
    blocks = block_numbers(keys, "joint_blocks.{}", "transformer_blocks.{}")
    last = swapped(
        "joint_blocks.{}.context_block.adaLN_modulation.1", "transformer_blocks.{}.norm1_context.linear"
    )
    rules = {rule.original: rule for rule in expanded((*_SD3_ENDS, *_sd3_block()), keys)}
    if blocks:
        final = numbered(last, blocks[-1])
        rules[final.original] = final
    return tuple(rules.values())


_SD3_ENDS = (
    renamed("pos_embed", "pos_embed.pos_embed"),
    renamed("x_embedder.proj", "pos_embed.proj"),
    renamed("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    renamed("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    renamed("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    renamed("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    renamed("context_embedder", "context_embedder"),
    renamed("final_layer.linear", "proj_out"),
    swapped("final_layer.adaLN_modulation.1", "norm_out.linear"),
)
SD3 = Naming(
    name="original (Stability) names",
    model_class="SD3Transformer2DModel",
    signature=frozenset(
        {"joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.context_block.attn.qkv.weight"}
    ),
    rules=_sd3_rules,
    suffixes={},
)

_LDM_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_LDM_ENDS = (
    renamed("time_embed.0", "time_embedding.linear_1"),
    renamed("time_embed.2", "time_embedding.linear_2"),
    renamed("label_emb.0.0", "add_embedding.linear_1"),
    renamed("label_emb.0.2", "add_embedding.linear_2"),
    renamed("input_blocks.0.0", "conv_in"),
    renamed("out.0", "conv_norm_out"),
    renamed("out.2", "conv_out"),
)


def _ldm_resnet(original: str, target: str) -> tuple[Rule, ...]:
    return tuple(renamed(f"{original}.{old}", f"{target}.{new}") for old, new in _LDM_RESNET)


def _ldm_rules(keys: Sequence[str]) -> tuple[Rule, ...]:
    """LDM numbers the UNet's stages through: a stage is its layers, then its down- or upsampler.

    An upsampler stands behind the last layer of a stage, or behind that layer's attention where there is one.
    """
    layers, stages = _ldm_stages(keys)
    with_attention = _ldm_attention_stages(keys, layers)
    rules = [*_LDM_ENDS]
    for stage in range(stages):
        down, up = f"down_blocks.{stage}", f"up_blocks.{stage}"
        for layer in range(layers):
            block = f"input_blocks.{1 + stage * (layers + 1) + layer}"
            rules += _ldm_resnet(f"{block}.0", f"{down}.resnets.{layer}")
            rules.append(renamed(f"{block}.1.*", f"{down}.attentions.{layer}.*"))
        rules.append(
            renamed(f"input_blocks.{(stage + 1) * (layers + 1)}.0.op", f"{down}.downsamplers.0.conv")
        )
        for layer in range(layers + 1):
            block = f"output_blocks.{stage * (layers + 1) + layer}"
            rules += _ldm_resnet(f"{block}.0", f"{up}.resnets.{layer}")
            if stage in with_attention:
                rules.append(renamed(f"{block}.1.*", f"{up}.attentions.{layer}.*"))
        behind = 2 if stage in with_attention else 1
        last = stage * (layers + 1) + layers
        rules.append(renamed(f"output_blocks.{last}.{behind}.conv", f"{up}.upsamplers.0.conv"))
    rules += _ldm_resnet("middle_block.0", "mid_block.resnets.0")
    rules.append(renamed("middle_block.1.*", "mid_block.attentions.0.*"))
    rules += _ldm_resnet("middle_block.2", "mid_block.resnets.1")
    return tuple(rules)


def _ldm_stages(keys: Sequence[str]) -> tuple[int, int]:
    """Layers in a stage of the way down, and the number of stages, from LDM's or diffusers' names."""
    if stages := block_numbers(keys, "down_blocks.{}"):
        return len(block_numbers(keys, "down_blocks.0.resnets.{}")), len(stages)
    blocks = len(block_numbers(keys, "input_blocks.{}")) - 1  # the first one is conv_in
    samplers = [n for n in block_numbers(keys, "input_blocks.{}") if f"input_blocks.{n}.0.op.weight" in keys]
    layers = samplers[0] - 1 if samplers else blocks
    return layers, (blocks + 1) // (layers + 1) if layers > 0 else 0


def _ldm_attention_stages(keys: Sequence[str], layers: int) -> frozenset[int]:
    """The stages of the way up that have attention."""
    if block_numbers(keys, "up_blocks.{}"):
        return frozenset(
            stage
            for stage in block_numbers(keys, "up_blocks.{}")
            if any(k.startswith(f"up_blocks.{stage}.att") for k in keys)
        )
    return frozenset(
        block // (layers + 1)
        for block in block_numbers(keys, "output_blocks.{}")
        if f"output_blocks.{block}.1.norm.weight" in keys
    )


LDM_UNET = Naming(
    name="LDM names",
    model_class="UNet2DConditionModel",
    signature=frozenset({"input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight", "out.2.weight"}),
    rules=_ldm_rules,
    suffixes={},
)

NAMINGS: tuple[Naming, ...] = (FLUX1, FLUX2, Z_IMAGE, PIXART, SANA, SD3, LDM_UNET)
