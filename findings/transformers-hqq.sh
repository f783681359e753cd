#!/bin/sh
# transformers 5 has a config for HQQ, and no HQQ.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 accelerate==1.12.0 transformers==5.24.0 hqq==0.2.8.post1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, HqqConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity(logging.CRITICAL)
print("software:   transformers", version("transformers"), "hqq", version("hqq"))
print("behavior:   HqqConfig is there and its quantizer takes it, but from_pretrained raises NotImplementedError: models that")
print("            earlier versions of transformers quantized by HQQ, or saved, do not load")
print("most guess: it quantizes, as its documentation says")

sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, vocab_size=64)).to(torch.bfloat16).save_pretrained("model")
try:
    AutoModelForCausalLM.from_pretrained("model", quantization_config=HqqConfig(nbits=4, group_size=64), device_map="cpu")
except NotImplementedError as error:
    print("seen:      ", error)
    raise SystemExit(0) from None
print("seen:       it quantizes")
raise SystemExit(1)
END
