#!/bin/sh
# A 4-bit bitsandbytes model, loaded in another dtype than it was saved in, has parameters in both.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 accelerate==1.12.0 transformers==5.24.0 bitsandbytes==0.50.2; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from collections import Counter
from importlib.metadata import version

import torch
from transformers import BitsAndBytesConfig, CLIPTextConfig, CLIPTextModel
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity(logging.CRITICAL)
print("software:   transformers", version("transformers"), "bitsandbytes", version("bitsandbytes"))
print("behavior:   a model that was quantized to NF4 and saved in bfloat16, loaded with dtype=torch.float32, has the weights of its")
print("            norms and embeddings in bfloat16 and all biases in float32, and fails when it runs. In bfloat16 it runs")
print("most guess: what is not 4-bit is loaded in the dtype that is asked for")

torch.manual_seed(0)
sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
CLIPTextModel(CLIPTextConfig(**sizes)).to(torch.bfloat16).save_pretrained("plain")
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
CLIPTextModel.from_pretrained("plain", quantization_config=config, dtype=torch.bfloat16, device_map="cpu").save_pretrained("nf4")


def runs(dtype: torch.dtype) -> tuple[str, dict[str, int]]:
    model = CLIPTextModel.from_pretrained("nf4", dtype=dtype, device_map="cpu").eval()
    kinds = Counter(str(parameter.dtype)[6:] for parameter in model.parameters())
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(8)[None])
    except RuntimeError as error:
        return f"RuntimeError: {error}", dict(kinds)
    return "runs", dict(kinds)


(same, _), (other, kinds) = runs(torch.bfloat16), runs(torch.float32)
print("seen:       bfloat16:", same)
print("            float32: ", other.splitlines()[0][:100], kinds)
raise SystemExit(0 if same == "runs" and other.startswith("RuntimeError") and kinds.get("bfloat16") else 1)
END
