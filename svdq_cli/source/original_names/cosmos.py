"""NVIDIA's names: Cosmos 2 and Anima, which was made from it, and Cosmos 1."""

from __future__ import annotations

from svdq_cli.source.names import Naming, renamed
from svdq_cli.source.original_names.table import in_stack, table

_MODULATED = ("self_attn", "cross_attn", "mlp")
_COSMOS2_BLOCK = (
    *(
        renamed(f"adaln_modulation_{part}.{layer}", f"norm{number}.linear_{layer}")
        for number, part in enumerate(_MODULATED, 1)
        for layer in (1, 2)
    ),
    *(
        renamed(f"{original}.{old}", f"{target}.{new}")
        for original, target in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for old, new in (
            *((f"{x}_proj", f"to_{x}") for x in "qkv"),
            *((f"{x}_norm", f"norm_{x}") for x in "qk"),
            ("output_proj", "to_out.0"),
        )
    ),
    renamed("mlp.layer1", "ff.net.0.proj"),
    renamed("mlp.layer2", "ff.net.2"),
)
_COSMOS1_BLOCK = (
    *(
        renamed(f"blocks.{part}.adaLN_modulation.{layer}", f"norm{part + 1}.linear_{layer}")
        for part in (0, 1, 2)
        for layer in (1, 2)
    ),
    *(
        renamed(f"blocks.{part}.block.attn.{old}", f"attn{part + 1}.{new}")
        for part in (0, 1)
        for old, new in (
            *((f"to_{x}.0", f"to_{x}") for x in "qkv"),
            *((f"to_{x}.1", f"norm_{x}") for x in "qk"),
            ("to_out.0", "to_out.0"),
        )
    ),
    renamed("blocks.2.block.layer1", "ff.net.0.proj"),
    renamed("blocks.2.block.layer2", "ff.net.2"),
)

COSMOS = Naming(
    name="original (Cosmos) names",
    model_class="CosmosTransformer3DModel",
    signature=frozenset({"blocks.0.adaln_modulation_self_attn.1.weight", "blocks.0.self_attn.q_proj.weight"}),
    rules=table(
        *in_stack("blocks", "transformer_blocks", _COSMOS2_BLOCK),
        *in_stack("blocks.block", "transformer_blocks", _COSMOS1_BLOCK, dot=""),
        renamed("x_embedder.proj.1", "patch_embed.proj"),
        *(
            renamed(f"t_embedder.1.linear_{layer}", f"time_embed.t_embedder.linear_{layer}")
            for layer in (1, 2)
        ),
        renamed("t_embedding_norm", "time_embed.norm"),
        renamed("affline_norm", "time_embed.norm"),
        *(
            renamed(f"final_layer.{word}.{layer}", f"norm_out.linear_{layer}")
            for word in ("adaln_modulation", "adaLN_modulation")
            for layer in (1, 2)
        ),
        renamed("final_layer.linear", "proj_out"),
    ),
    suffixes={},
)
