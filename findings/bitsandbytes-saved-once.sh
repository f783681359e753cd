#!/bin/sh
# transformers does not save a 4-bit model that was loaded in 4 bits.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 accelerate==1.15.0 transformers==5.24.0 bitsandbytes==0.50.2; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from importlib.metadata import version

import torch
from transformers import BitsAndBytesConfig, T5Config, T5EncoderModel
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity(logging.CRITICAL)
print("software:   transformers", version("transformers"), "bitsandbytes", version("bitsandbytes"))
print("behavior:   an NF4 model that was quantized while it was loaded is saved. Loaded from what was saved, save_pretrained")
print("            raises NotImplementedError without a word")
print("most guess: a model that loads from a folder can be saved to another one")

torch.manual_seed(0)
sizes = T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=100)
T5EncoderModel(sizes).to(torch.bfloat16).save_pretrained("plain")
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
T5EncoderModel.from_pretrained("plain", quantization_config=nf4, dtype=torch.bfloat16).save_pretrained("first")
again = T5EncoderModel.from_pretrained("first", dtype=torch.bfloat16)
kind = type(again.encoder.block[0].layer[0].SelfAttention.q.weight).__name__
print("seen:       quantized and saved once; loaded again:", kind)
try:
    again.save_pretrained("second")
    said = None
except NotImplementedError as error:
    said = error
print("seen:       saving that:", "works" if said is None else f"{type(said).__name__}({str(said)!r})")
raise SystemExit(0 if said is not None and kind == "Params4bit" else 1)
END
