#!/bin/sh
# diffusers loads a file with scaled float8 weights, as ComfyUI users have them, without the scales.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - 2>/dev/null <<'END'
from importlib.metadata import version

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

print("software:   diffusers", version("diffusers"))
print("behavior:   from_single_file reads float8 weights with a scale_weight each as numbers: they are hundreds of times too large; the")
print("            scales are listed among weights that were not used")
print("most guess: they are scaled, or the file is refused")

ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0", "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0", "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "attn1": "self_attn", "attn2": "cross_attn", ".to_out.0.": ".o.",
    ".to_q.": ".q.", ".to_k.": ".k.", ".to_v.": ".v.", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "norm2": "norm3",
    "scale_shift_table": "modulation", "proj_out": "head.head",
}  # fmt: skip


def original(name):
    for new, old in ORIGINAL.items():
        name = name.replace(new, old)
    return "model.diffusion_model." + ("head.modulation" if name == "modulation" else name)


torch.manual_seed(0)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=1, rope_max_seq_len=32
).bfloat16()
model.save_config("config/transformer")
plain = {original(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
scaled = {"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
for name, tensor in plain.items():
    if ".blocks." in name and name.endswith(".weight") and tensor.ndim == 2:
        scale = tensor.float().abs().max() / 448
        scaled[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        scaled[name.removesuffix("weight") + "scale_weight"] = scale.reshape(1)
    else:
        scaled[name] = tensor
save_file(plain, "plain.safetensors")
save_file(scaled, "scaled.safetensors")


def largest(file):
    loaded = WanTransformer3DModel.from_single_file(
        file, config="config", subfolder="transformer", torch_dtype=torch.bfloat16
    )
    return float(loaded.blocks[0].attn1.to_q.weight.abs().max())


plain, scaled = largest("plain.safetensors"), largest("scaled.safetensors")
print(f"seen:       largest weight of blocks.0.attn1.to_q: {plain:.3f} in the bfloat16 file, {scaled:.0f} loaded from the float8 file")
raise SystemExit(0 if plain < 1 and scaled == 448 else 1)
END
