#!/bin/sh
# Without a GPU, transformers runs 4-bit bitsandbytes models, and diffusers refuses them.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 bitsandbytes==0.50.2 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import os
import warnings
from importlib.metadata import version

os.environ["CUDA_VISIBLE_DEVICES"] = ""
warnings.filterwarnings("ignore")

import torch
from diffusers import BitsAndBytesConfig as DiffusersConfig
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging
from transformers import BitsAndBytesConfig, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

logging.set_verbosity(logging.CRITICAL)
transformers_logging.set_verbosity(transformers_logging.CRITICAL)
names = ("diffusers", "transformers", "bitsandbytes")
print("software:  ", *(f"{name} {version(name)}" for name in names))
print("behavior:   on a CPU, transformers quantizes a text encoder to NF4 and runs it. diffusers raises for the transformer of the")
print("            same pipeline, with the same library: 'No GPU found. A GPU is needed for quantization.'")
print("most guess: one library, one answer")


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


flux().save_pretrained("flux")
sizes = T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, vocab_size=100)
T5EncoderModel(sizes).to(torch.bfloat16).save_pretrained("t5")
how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
encoder = T5EncoderModel.from_pretrained("t5", quantization_config=BitsAndBytesConfig(**how), dtype=torch.bfloat16)
with torch.no_grad():
    finite = bool(encoder(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all())
kind = type(encoder.encoder.block[0].layer[0].SelfAttention.q.weight).__name__
print("seen:       transformers:", kind, "- output finite:", finite)
try:
    FluxTransformer2DModel.from_pretrained("flux", quantization_config=DiffusersConfig(**how), dtype=torch.bfloat16)
    said = "loaded"
except RuntimeError as error:
    said = str(error)
print("seen:       diffusers:", said)
raise SystemExit(0 if finite and kind == "Params4bit" and "No GPU found" in said else 1)
END
