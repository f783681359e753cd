"""Wan's names: Wan 2.1 and 2.2, from text, from an image, and VACE, whose control blocks are blocks as well.

Other models that were made from Wan (SkyReels-V2, ChronoEdit) have the same names.
"""

from __future__ import annotations

from svdq_cli.source.names import Naming, Rule, fused, renamed
from svdq_cli.source.original_names.table import also_called, in_stack, in_stacks, table

_ATTENTION = (
    *((x, f"to_{x}") for x in "qkv"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
    ("k_img", "add_k_proj"),
    ("v_img", "add_v_proj"),
    ("norm_k_img", "norm_added_k"),
)
_BLOCK = (
    *(
        renamed(f"{original}.{old}", f"{target}.{new}")
        for original, target in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for old, new in _ATTENTION
    ),
    # the original numbers the norms as they were written, diffusers as they are used
    renamed("norm3", "norm2"),
    renamed("norm2", "norm3"),
    renamed("ffn.0", "ffn.net.0.proj"),
    renamed("ffn.2", "ffn.net.2"),
    renamed("modulation", "scale_shift_table"),
    renamed("before_proj", "proj_in"),
    renamed("after_proj", "proj_out"),
)
_IMAGE = "condition_embedder.image_embedder"
_ENDS: tuple[Rule, ...] = (
    renamed("patch_embedding", "patch_embedding"),
    renamed("vace_patch_embedding", "vace_patch_embedding"),
    *(
        renamed(f"{name}_embedding.{old}", f"condition_embedder.{name}_embedder.{new}")
        for name in ("time", "text")
        for old, new in (("0", "linear_1"), ("2", "linear_2"))
    ),
    renamed("time_projection.1", "condition_embedder.time_proj"),
    renamed("img_emb.proj.0", f"{_IMAGE}.norm1"),
    renamed("img_emb.proj.1", f"{_IMAGE}.ff.net.0.proj"),
    renamed("img_emb.proj.3", f"{_IMAGE}.ff.net.2"),
    renamed("img_emb.proj.4", f"{_IMAGE}.norm2"),
    renamed("img_emb.emb_pos", f"{_IMAGE}.pos_embed"),
    renamed("head.head", "proj_out"),
    renamed("head.modulation", "scale_shift_table"),
)

# Wan Animate's: its convolutions over faces and poses, and the attention that reads them
_ANIMATE = (
    renamed("pose_patch_embedding", "pose_patch_embedding"),
    renamed("face_encoder.conv1_local.conv", "face_encoder.conv1_local"),
    *(renamed(f"face_encoder.conv{number}.conv", f"face_encoder.conv{number}") for number in (2, 3)),
    renamed("face_encoder.out_proj", "face_encoder.out_proj"),
    renamed("motion_encoder.enc.fc.{}", "motion_encoder.motion_network.{}"),
    *in_stack(
        "face_adapter.fuser_blocks",
        "face_adapter",
        (
            renamed("linear1_q", "to_q"),
            fused("linear1_kv", "to_k", "to_v"),
            renamed("linear2", "to_out"),
            *(renamed(f"{x}_norm", f"norm_{x}") for x in "qk"),
        ),
    ),
)

WAN = Naming(
    name="original (Wan) names",
    model_class="WanTransformer3DModel",
    relatives=frozenset(
        f"{name}Transformer3DModel"
        for name in ("WanVACE", "WanAnimate", "SkyReelsV2", "ChronoEdit", "Helios")
    ),
    signature=frozenset({"head.modulation", "blocks.0.self_attn.q.weight"}),
    rules=table(*_ENDS, *_ANIMATE, *in_stacks(("blocks", "vace_blocks"), _BLOCK)),
    suffixes={},
)

_SAME_ENDS = ("text_embedding", "time_embedding", "time_projection", "img_emb", "head")

WAN_ANIMATE2 = Naming(
    name="original (Wan Animate 2) names",
    model_class="WanAnimate2Transformer3DModel",
    signature=frozenset({"head.modulation", "blocks.0.block.self_attn.q.weight"}),
    rules=table(
        # LoRAs name the layers without the module around each block
        *also_called(
            ((".block.", "."),),
            *in_stack(
                "blocks",
                "blocks",
                (
                    *(
                        renamed(f"block.{attention}.{old}", f"{attention}.{new}")
                        for attention in ("self_attn", "cross_attn")
                        for old, new in _ATTENTION
                    ),
                    renamed("block.*", "*"),
                ),
            ),
        ),
        renamed("patch_embedding", "patch_embedding"),
        *(renamed(f"{name}.*", f"{name}.*") for name in _SAME_ENDS),
    ),
    suffixes={},
)
