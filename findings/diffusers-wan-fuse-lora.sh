#!/bin/sh
# fuse_lora() of a Wan 2.2 pipeline fuses the LoRA of one of its two transformers, and unload_lora_weights() drops the other.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 ftfy==6.3.1 peft==0.21.2 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - 2>/dev/null <<'END'
from importlib.metadata import version

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

print("software:   diffusers", version("diffusers"), "and peft", version("peft"))
print("behavior:   Wan 2.2 has two transformers, and LoRAs come as a pair. Both are loaded, listed and weighed together; fuse_lora() fuses")
print("            that of the first alone, and unload_lora_weights() then removes the other, without a word")
print("most guess: fuse_lora() fuses what set_adapters() set")


def denoiser():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=256, ffn_dim=32, num_layers=1, rope_max_seq_len=32
    )


def lora(model):
    layer = model.blocks[0].attn1.to_q
    name = "transformer.blocks.0.attn1.to_q"
    return {
        f"{name}.lora_A.weight": torch.randn(4, layer.in_features),
        f"{name}.lora_B.weight": torch.randn(layer.out_features, 4),
    }


torch.manual_seed(0)
pipe = WanPipeline(
    tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(),
    transformer=denoiser(), transformer_2=denoiser(), boundary_ratio=0.875,
)  # fmt: skip
models = (pipe.transformer, pipe.transformer_2)
before = [model.blocks[0].attn1.to_q.weight.clone() for model in models]
pipe.load_lora_weights(lora(pipe.transformer), adapter_name="high")
pipe.load_lora_weights(lora(pipe.transformer_2), adapter_name="low", load_into_transformer_2=True)
pipe.set_adapters(["high", "low"], [1.0, 1.0])
print("seen:       adapters:", pipe.get_list_adapters())
pipe.fuse_lora()
pipe.unload_lora_weights()
changed = [not torch.equal(model.blocks[0].attn1.to_q.weight, old) for model, old in zip(models, before)]
print("            after fuse_lora() and unload_lora_weights(): transformer changed", changed[0], "- transformer_2 changed", changed[1])
raise SystemExit(0 if changed == [True, False] else 1)
END
