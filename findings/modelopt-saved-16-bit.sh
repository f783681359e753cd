#!/bin/sh
# A model that NVIDIA ModelOpt quantized and save_pretrained saved has its 16-bit weights; its own export has 8 bits.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 diffusers==0.42.1 nvidia-modelopt==0.47.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import contextlib
import io
import warnings
from importlib.metadata import version
from pathlib import Path

warnings.filterwarnings("ignore")
import modelopt.torch.opt as opt
import modelopt.torch.quantization as quantization
import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file

logging.set_verbosity(logging.CRITICAL)
print("software:   nvidia-modelopt", version("nvidia-modelopt"), "diffusers", version("diffusers"))
print("behavior:   of a transformer quantized to FP8, save_pretrained writes the weights as they were, in 16 bits, with a number")
print("            beside each; only export_hf_checkpoint writes 8 bits")
print("most guess: a quantized model is saved quantized, in half of the size")


def flux() -> FluxTransformer2DModel:
    """FLUX.1's transformer, small, with random weights."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        axes_dims_rope=(16, 24, 24),
    ).to(torch.bfloat16)


def run(model: FluxTransformer2DModel) -> None:
    numbers = [torch.randn(size, dtype=torch.bfloat16) for size in ((1, 16, 64), (1, 8, 256), (1, 256))]
    with torch.no_grad():
        model(*numbers, torch.tensor([0.5]).bfloat16(), torch.zeros(16, 3), torch.zeros(8, 3))


name = "transformer_blocks.0.attn.to_q.weight"
exact = flux().state_dict()[name]
model = flux()
with contextlib.redirect_stdout(io.StringIO()):
    quantization.quantize(model, quantization.FP8_DEFAULT_CFG, run)
    opt.enable_huggingface_checkpointing()
    model.save_pretrained("saved")
    export_hf_checkpoint(model, export_dir=Path("exported"))
files = {folder: Path(folder) / "diffusion_pytorch_model.safetensors" for folder in ("saved", "exported")}
weights = {folder: load_file(file)[name] for folder, file in files.items()}
for folder, file in files.items():
    print(f"seen:       {folder}: {weights[folder].dtype}, {file.stat().st_size:,} bytes")
equal = torch.equal(weights["saved"], exact)
print("seen:       saved: the weights are those from before:", equal)
raise SystemExit(0 if equal and weights["exported"].dtype == torch.float8_e4m3fn else 1)
END
