"""ACE-Step 1.5's names."""

from __future__ import annotations

from svdq_cli.source.names import Naming, renamed
from svdq_cli.source.original_names.table import in_stack, table

ACE_STEP = Naming(
    name="original (ACE-Step) names",
    model_class="AceStepTransformer1DModel",
    signature=frozenset({"layers.0.self_attn.q_proj.weight", "layers.0.cross_attn.q_proj.weight"}),
    rules=table(
        *in_stack(
            "layers",
            "layers",
            (
                *(
                    renamed(f"{attention}.{old}", f"{attention}.{new}")
                    for attention in ("self_attn", "cross_attn")
                    for old, new in (*((f"{x}_proj", f"to_{x}") for x in "qkv"), ("o_proj", "to_out.0"))
                ),
                renamed("*", "*"),
            ),
        ),
    ),
    suffixes={},
)
