"""AuraFlow's names."""

from __future__ import annotations

from svdq_cli.source.names import Naming, Rule, renamed, swapped
from svdq_cli.source.original_names.table import in_stack, table

_QKV_OUT = tuple(zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True))
_ADDED = tuple(zip("qkvo", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), strict=True))


def _mlp(original: str, target: str) -> tuple[Rule, ...]:
    layers = (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
    return tuple(renamed(f"{original}.{old}", f"{target}.{new}") for old, new in layers)


_DOUBLE = (
    *(renamed(f"attn.w2{old}", f"attn.{new}") for old, new in _QKV_OUT),
    *(renamed(f"attn.w1{old}", f"attn.{new}") for old, new in _ADDED),
    *_mlp("mlpX", "ff"),
    *_mlp("mlpC", "ff_context"),
    renamed("modX.1", "norm1.linear"),
    renamed("modC.1", "norm1_context.linear"),
)
_SINGLE = (
    *(renamed(f"attn.w1{old}", f"attn.{new}") for old, new in _QKV_OUT),
    *_mlp("mlp", "ff"),
    renamed("modCX.1", "norm1.linear"),
)

AURAFLOW = Naming(
    name="original (AuraFlow) names",
    model_class="AuraFlowTransformer2DModel",
    signature=frozenset({"double_layers.0.attn.w2q.weight", "cond_seq_linear.weight"}),
    rules=table(
        *in_stack("double_layers", "joint_transformer_blocks", _DOUBLE),
        *in_stack("single_layers", "single_transformer_blocks", _SINGLE),
        renamed("register_tokens", "register_tokens"),
        renamed("t_embedder.mlp.0", "time_step_proj.linear_1"),
        renamed("t_embedder.mlp.2", "time_step_proj.linear_2"),
        renamed("cond_seq_linear", "context_embedder"),
        renamed("positional_encoding", "pos_embed.pos_embed"),
        renamed("init_x_linear", "pos_embed.proj"),
        swapped("modF.1", "norm_out.linear"),
        renamed("final_linear", "proj_out"),
    ),
    suffixes={},
)
