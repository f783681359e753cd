"""Z-Image and Z-Image-Turbo: one stream of text and image tokens, after refiners for either; SwiGLU feed-forward.

w1 (gate) and w3 (hidden) read one input. Nunchaku's engine runs no 4-bit modulation here (2 % of the parameters), so it
stays at 16 bits.
"""

from __future__ import annotations

from svdq_cli.families.family import BlockRule, Family, alone, together

_RULES = (
    together("attention.to_q", "attention.to_k", "attention.to_v"),
    alone("attention.to_out.0"),
    together("feed_forward.w1", "feed_forward.w3"),
    alone("feed_forward.w2"),
)

Z_IMAGE = Family(
    name="z-image",
    models="Z-Image, Z-Image-Turbo",
    classes=("ZImageTransformer2DModel",),
    config_signature=frozenset({"all_patch_size", "all_f_patch_size", "cap_feat_dim"}),
    component="transformer",
    blocks=(
        *(BlockRule(stack, _RULES) for stack in ("noise_refiner", "context_refiner", "layers")),
        # of the variants that also read images
        BlockRule("siglip_refiner", _RULES, optional=True),
    ),
    keep=(
        "*.adaLN_modulation.*",
        "all_x_embedder.*",
        "all_final_layer.*",
        "t_embedder.*",
        "cap_embedder.*",
        "siglip_embedder.*",
    ),
)
