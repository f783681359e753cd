#!/bin/sh
# dtype="auto" means float32 in diffusers.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from importlib.metadata import version

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_logging

warnings.filterwarnings("ignore")
logging.set_verbosity(logging.CRITICAL)
transformers_logging.set_verbosity(transformers_logging.CRITICAL)
print("software:   diffusers", version("diffusers"), "beside transformers", version("transformers"))
print("behavior:   diffusers takes dtype='auto' for a wrong value and loads float32, twice the memory of a bfloat16 file, as it")
print("            does without a dtype. transformers takes the file's dtype in both cases. Text encoders and transformer of")
print("            one pipeline differ, if each is loaded by its own library")
print("most guess: 'auto' is the dtype of the file in both, or an error")


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
sizes = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100)
CLIPTextModel(sizes).to(torch.bfloat16).save_pretrained("clip")
good = True
for words, options in (("dtype='auto'", {"dtype": "auto"}), ("no dtype", {})):
    ours = FluxTransformer2DModel.from_pretrained("flux", **options).dtype
    theirs = CLIPTextModel.from_pretrained("clip", **options).dtype
    print(f"seen:       {words}, both files bfloat16: diffusers {ours}, transformers {theirs}")
    good = good and (ours, theirs) == (torch.float32, torch.bfloat16)
raise SystemExit(0 if good else 1)
END
