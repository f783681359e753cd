"""Lightricks' names: LTX-Video and LTX-2, which call most layers as diffusers does."""

from __future__ import annotations

from svdq_cli.source.names import Naming, Rule, renamed
from svdq_cli.source.original_names.table import in_stack, table

_LTX2_ATTENTIONS = (
    *("attn1", "attn2", "audio_attn1", "audio_attn2"),
    *("audio_to_video_attn", "video_to_audio_attn"),
)
_LTX2_TABLES = (
    ("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
    ("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
)
_LTX2_MODULATION = (
    ("adaln_single", "time_embed"),
    ("audio_adaln_single", "audio_time_embed"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    # LTX-2.3
    ("prompt_adaln_single", "prompt_adaln"),
    ("audio_prompt_adaln_single", "audio_prompt_adaln"),
)
_SAME_NAMES = ("caption_projection", "audio_caption_projection")


def _block(attentions: tuple[str, ...]) -> tuple[Rule, ...]:
    return (
        *(renamed(f"{name}.{x}_norm", f"{name}.norm_{x}") for name in attentions for x in "qk"),
        renamed("*", "*"),
    )


LTX_VIDEO = Naming(
    name="original (LTX-Video) names",
    model_class="LTXVideoTransformer3DModel",
    signature=frozenset({"patchify_proj.weight", "adaln_single.linear.weight"}),
    rules=table(
        renamed("patchify_proj", "proj_in"),
        renamed("adaln_single.*", "time_embed.*"),
        renamed("caption_projection.*", "caption_projection.*"),
        *in_stack("transformer_blocks", "transformer_blocks", _block(("attn1", "attn2"))),
        *(renamed(name, name) for name in ("proj_out", "scale_shift_table")),
    ),
    suffixes={},
)

LTX2 = Naming(
    name="original (LTX-2) names",
    model_class="LTX2VideoTransformer3DModel",
    signature=frozenset({"patchify_proj.weight", "audio_patchify_proj.weight"}),
    rules=table(
        renamed("patchify_proj", "proj_in"),
        renamed("audio_patchify_proj", "audio_proj_in"),
        *(renamed(f"{original}.*", f"{target}.*") for original, target in _LTX2_MODULATION),
        *(renamed(f"{name}.*", f"{name}.*") for name in _SAME_NAMES),
        *in_stack(
            "transformer_blocks",
            "transformer_blocks",
            (*(renamed(*pair) for pair in _LTX2_TABLES), *_block(_LTX2_ATTENTIONS)),
        ),
        *(renamed(name, name) for name in ("proj_out", "audio_proj_out")),
        *(renamed(name, name) for name in ("scale_shift_table", "audio_scale_shift_table")),
    ),
    suffixes={},
)
