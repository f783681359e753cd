"""MiniMax-H3's names."""

from __future__ import annotations

from svdq_cli.source.names import Naming, fused, renamed, swapped
from svdq_cli.source.original_names.table import in_stack, table

_BLOCK = (
    fused("attn.qkv_proj", "attn.to_q", "attn.to_k", "attn.to_v"),
    renamed("attn.out_proj", "attn.to_out.0"),
    *(renamed(f"attn.{x}_norm", f"attn.norm_{x}") for x in "qk"),
    # the original has the gate above the values, diffusers' SwiGLU the values above the gate
    swapped("mlp.fc1", "ff.net.0.proj"),
    renamed("mlp.fc2", "ff.net.2"),
    renamed("adaln_proj.linear", "adaln_proj.linear"),
    *(renamed(f"norm{number}", f"norm{number}") for number in (1, 2)),
)

MINIMAX_H3 = Naming(
    name="original (MiniMax-H3) names",
    model_class="MiniMaxH3Transformer3DModel",
    signature=frozenset({"blocks.0.attn.qkv_proj.weight", "final_layer.video_out.weight"}),
    rules=table(
        *in_stack("blocks", "transformer_blocks", _BLOCK),
        *in_stack("token_refiner.blocks", "token_refiner.refiner_blocks", _BLOCK),
        renamed("token_refiner.final_norm", "token_refiner.final_norm"),
        renamed("video_patch_proj", "proj_in"),
        renamed("audio_patch_proj", "audio_proj_in"),
        renamed("condition_proj", "context_embedder"),
        renamed("time_embedder.proj_in", "time_embedder.linear_1"),
        renamed("time_embedder.proj_out", "time_embedder.linear_2"),
        renamed("final_layer.norm", "norm_out.norm"),
        renamed("final_layer.adaln_proj.linear", "norm_out.linear"),
        renamed("final_layer.video_out", "proj_out"),
        renamed("final_layer.audio_out", "audio_proj_out"),
    ),
    suffixes={},
    unused=frozenset({"rope.inv_freq"}),
    by_heads="attn.qkv_proj",
    alpha_in_header=True,
)
