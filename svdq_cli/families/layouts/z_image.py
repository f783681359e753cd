"""Z-Image in the files of Nunchaku's Python modules and of vLLM-Omni.

The feed-forward network is w2(silu(w1 x) * w3 x). Nunchaku stacks hidden before gate (w3, w1). vLLM-Omni 0.30 stacks
gate before hidden, and can't load the stack in 4 bits: its loader takes the ".w1" of ".w13" for the gate, and the gate
and hidden layer apart for shards, of which `wtscale` has none. There both stay at 16 bits, under their own names.
"""

from __future__ import annotations

from svdq_cli.families.layouts.layout import BlockLayout, ModelLayout, ModuleRule, renamed, same, stacked

STACKS = ("noise_refiner", "context_refiner", "layers")

_ATTENTION = (
    stacked("attention.to_qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
    same("attention.to_out.0"),
)


def _blocks(*modules: ModuleRule) -> tuple[BlockLayout, ...]:
    return tuple(BlockLayout(stack, stack, (*_ATTENTION, *modules)) for stack in STACKS)


NUNCHAKU = ModelLayout(
    family="z-image",
    format="nunchaku",
    blocks=_blocks(
        stacked("feed_forward.net.0.proj", "feed_forward.w3", "feed_forward.w1"),
        renamed("feed_forward.net.2", "feed_forward.w2"),
    ),
    runtime_class="NunchakuZImageTransformer2DModel",
    sglang=True,
)

VLLM_OMNI = ModelLayout(
    family="z-image",
    format="vllm-omni",
    blocks=_blocks(same("feed_forward.w2")),
)
