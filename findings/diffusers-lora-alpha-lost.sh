#!/bin/sh
# diffusers saves a LoRA without its alpha.
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
from peft import LoraConfig, get_peft_model_state_dict

print("software:   diffusers", version("diffusers"), "and peft", version("peft"))
print("behavior:   save_lora_weights(transformer_lora_layers=...) writes A and B alone; load_lora_weights then takes alpha = rank. A")
print("            LoRA trained with lora_alpha = 4 * r comes back at a quarter of its strength. It is kept only if the caller")
print("            passes transformer_lora_adapter_metadata too.")
print("most guess: what is saved and loaded again computes the same")


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


trained = flux().transformer
plain = output(trained)
config = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_k"], init_lora_weights=False)
trained.add_adapter(config)
wanted = output(trained)
layers = get_peft_model_state_dict(trained)

errors = {}
for name, options in (
    ("without metadata", {}),
    ("with metadata", {"transformer_lora_adapter_metadata": trained.peft_config["default"].to_dict()}),
):
    FluxPipeline.save_lora_weights(name, transformer_lora_layers=layers, **options)
    again = flux()
    again.load_lora_weights(name)
    errors[name] = float((output(again.transformer) - wanted).norm() / (wanted - plain).norm())
    scale = next(m.scaling for m in again.transformer.modules() if hasattr(m, "scaling"))
    print(f"seen:       {name}: scale {list(scale.values())[0]:g} of 4, error {errors[name]:.3f} of the LoRA's change")
raise SystemExit(0 if errors["without metadata"] > 0.3 and errors["with metadata"] < 1e-4 else 1)
END
