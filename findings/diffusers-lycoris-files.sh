#!/bin/sh
# diffusers loads DoRA and LoHa files for FLUX.1 without an error, as something else.
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

print("software:   diffusers", version("diffusers"))
print("behavior:   load_lora_weights of a FLUX.1 file in kohya's names raises nothing for kinds that it does not know: of a DoRA,")
print("            it drops the magnitudes (dora_scale) and applies the rest as a plain LoRA; of a LoHa it applies nothing. Both")
print("            are told in log messages only.")
print("most guess: an adapter of an unknown kind is an error, and a load without an error changes the model as trained")


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


name = "lora_unet_double_blocks_0_img_attn_qkv"
torch.manual_seed(2)
lora = {
    f"{name}.lora_down.weight": torch.randn(4, 32),
    f"{name}.lora_up.weight": torch.randn(96, 4),
    f"{name}.alpha": torch.tensor(4.0),
}
dora = {**lora, f"{name}.dora_scale": 5 * torch.rand(96, 1)}
loha = {f"{name}.hada_w{i}_a": torch.randn(96, 2) for i in (1, 2)}
loha |= {f"{name}.hada_w{i}_b": torch.randn(2, 32) for i in (1, 2)}
loha |= {f"{name}.alpha": torch.tensor(2.0)}


def loaded(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    pipe = flux()
    pipe.load_lora_weights(dict(tensors))
    return output(pipe.transformer)


plain = output(flux().transformer)
as_lora, as_dora, as_loha = loaded(lora), loaded(dora), loaded(loha)
changes = [float((result - plain).norm()) for result in (as_lora, as_dora, as_loha)]
same = torch.equal(as_lora, as_dora)
print("seen:       change of the output: LoRA {:.3f}, DoRA {:.3f}, LoHa {:.3f};".format(*changes), end=" ")
print(f"DoRA equal to the LoRA without magnitudes: {same}")
raise SystemExit(0 if changes[0] > 0.1 and same and changes[2] == 0 else 1)
END
