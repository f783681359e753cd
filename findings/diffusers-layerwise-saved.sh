#!/bin/sh
# A diffusers model with layerwise casting on is saved in 8 bits, and nothing in the folder says so.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings("ignore")
import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging
from safetensors.torch import load_file

logging.set_verbosity(logging.CRITICAL)
print("software:   diffusers", version("diffusers"))
print("behavior:   enable_layerwise_casting(storage_dtype=float8) changes the weights themselves: save_pretrained writes 8-bit")
print("            floats without scales, the config says nothing of it, and from_pretrained(dtype=bfloat16) loads what is left")
print("most guess: casting is a setting of this process, and the file keeps the 16-bit weights")


def flux() -> FluxTransformer2DModel:
    """FLUX.1's transformer, small, with random weights."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).to(torch.bfloat16)


name = "transformer_blocks.0.ff.net.0.proj.weight"
exact = flux().state_dict()[name]
model = flux()
model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
model.save_pretrained("cast")
stored = load_file("cast/diffusion_pytorch_model.safetensors")[name]
config = Path("cast/config.json").read_text()
again = FluxTransformer2DModel.from_pretrained("cast", torch_dtype=torch.bfloat16).state_dict()[name]
off = float((again.float() - exact.float()).norm() / exact.float().norm())
print("seen:       stored as", stored.dtype, "- 'float8' or 'quantization' in config.json:", "float8" in config or "quantization" in config)
print(f"seen:       loaded again as {again.dtype}, off by {off:.1%}")
as_stated = stored.dtype == torch.float8_e4m3fn and "float8" not in config and "quantization" not in config
raise SystemExit(0 if as_stated and again.dtype == torch.bfloat16 and off > 0.01 else 1)
END
