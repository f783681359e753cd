"""Stability's names: SD3 and SD3.5, and the UNets of Stable Diffusion 1.x, 2.x and XL (LDM)."""

from __future__ import annotations

from collections.abc import Sequence

from svdq_cli.source.names import Naming, Rule, block_numbers, expanded, fused, numbered, renamed, swapped

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

    An upsampler follows the last layer of a stage, or behind that layer's attention where there is one.
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
    signature=frozenset({"input_blocks.0.0.weight", "input_blocks.1.0.in_layers.0.weight", "out.2.weight"}),
    rules=_ldm_rules,
    suffixes={},
)
