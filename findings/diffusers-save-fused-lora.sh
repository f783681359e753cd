#!/bin/sh
# A diffusers model saved with a fused LoRA cannot be loaded again.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 safetensors==0.8.0 peft==0.21.2 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from safetensors.torch import load_file

print("software:   diffusers", version("diffusers"), "and peft", version("peft"))
print("behavior:   after fuse_lora, save_pretrained writes the layers as NAME.base_layer.weight. from_pretrained of that folder")
print("            raises nothing, but leaves these layers without values (on the meta device). With the adapter deleted first,")
print("            the fused weights are saved under their own names.")
print("most guess: fusing puts the LoRA into the weights, so that saving gives an ordinary model")


def flux() -> FluxPipeline:
    """The transformer of FLUX.1 with random weights, and none of its companions. Each call gives the same."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing)


@torch.no_grad()
def output(transformer: FluxTransformer2DModel) -> torch.Tensor:
    torch.manual_seed(1)
    return transformer(
        hidden_states=torch.randn(1, 4, 4),
        encoder_hidden_states=torch.randn(1, 3, 8),
        pooled_projections=torch.randn(1, 8),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample


def fused() -> FluxTransformer2DModel:
    transformer = flux().transformer
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    transformer.fuse_lora()
    return transformer


attached, cleaned = fused(), fused()
wanted = output(attached)
cleaned.unload_lora()
attached.save_pretrained("attached")
cleaned.save_pretrained("cleaned")
names = [key for key in load_file("attached/diffusion_pytorch_model.safetensors") if "base_layer" in key]
again = FluxTransformer2DModel.from_pretrained("attached")
missing = sum(parameter.is_meta for parameter in again.parameters())
whole = FluxTransformer2DModel.from_pretrained("cleaned")
error = float((output(whole) - wanted).norm() / wanted.norm())
print(f"seen:       {len(names)} tensors such as {min(names)};")
print(f"            {missing} parameters without values after loading; error with the adapter deleted first {error:.1e}")
raise SystemExit(0 if len(names) == missing == 8 and error < 1e-5 else 1)
END
