#!/bin/sh
# ModelOpt's preset configurations leave the largest layer of FLUX.1's single blocks at 16 bits, because of its name.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 nvidia-modelopt==0.47.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

code=0
venv/bin/python -I - >output 2>/dev/null <<'END' || code=$?
from importlib.metadata import version

import modelopt.torch.quantization as mtq
import torch
from diffusers import FluxTransformer2DModel

print("software:   nvidia-modelopt", version("nvidia-modelopt"), "and diffusers", version("diffusers"))
print("behavior:   the presets disable the quantizers of `*proj_out.*`, meant for a model's last layer. The single blocks of FLUX.1 have a")
print("            `proj_out` each, of 15,360 inputs in the released model: all of them stay at 16 bits, without a word")
print("most guess: every linear layer but the last one is quantized, or a message says what is not")


def flux():
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    )


torch.manual_seed(0)
inputs = {
    "hidden_states": torch.randn(1, 16, 64),
    "encoder_hidden_states": torch.randn(1, 8, 256),
    "pooled_projections": torch.randn(1, 256),
    "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(16, 3),
    "txt_ids": torch.zeros(8, 3),
    "guidance": torch.tensor([3.5]),
}
kept = {}
for preset in ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"):
    model = flux()
    with torch.no_grad():
        mtq.quantize(model, getattr(mtq, preset), lambda each: each(**inputs))
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    kept[preset] = [name for name, layer in linears.items() if not layer.weight_quantizer.is_enabled]
block = flux().single_transformer_blocks[0]
share = block.proj_out.weight.numel() / sum(each.numel() for each in block.parameters())
print("seen:       layers left at 16 bits")
for preset, names in kept.items():
    print(f"            {preset}: {', '.join(names)}")
print(f"            such a layer's share of the weights of its block, here: {share:.0%}")
expected = ["single_transformer_blocks.0.proj_out", "proj_out"]
raise SystemExit(0 if all(names == expected for names in kept.values()) else 1)
END
grep -E "^(software|behavior|most guess|seen): |^            [a-zA-Z\`]" output
exit $code
