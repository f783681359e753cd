#!/bin/sh
# transformers unpacks a 4-bit compressed-tensors model when it first runs.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 accelerate==1.12.0 transformers==5.24.0 compressed-tensors==0.20.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from importlib.metadata import version

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

warnings.filterwarnings("ignore")
logging.set_verbosity(logging.CRITICAL)
print("software:   compressed-tensors", version("compressed-tensors"), "transformers", version("transformers"))
print("behavior:   a pack-quantized model (4 bits) takes 4 bits a weight once it is loaded, and 16 bits from its first forward pass")
print("            on: all of its layers are unpacked then, and stay so")
print("most guess: it computes from 4-bit weights, so it fits where the 16-bit model does not")


def held(model) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


torch.manual_seed(0)
sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=64, vocab_size=64)).to(torch.bfloat16)
whole = held(model)
args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
groups = {"all": QuantizationScheme(targets=["Linear"], weights=args)}
apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized"))
for module in model.modules():
    if hasattr(module, "weight_scale"):
        grouped = module.weight.data.view(len(module.weight), -1, 128)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        module.weight_scale.data.copy_(scale)
compressor = ModelCompressor.from_pretrained_model(model)
compressor.compress_model(model)
model.save_pretrained("packed")
compressor.update_config("packed")

loaded = AutoModelForCausalLM.from_pretrained("packed", dtype=torch.bfloat16)
before = held(loaded)
with torch.no_grad():
    loaded(input_ids=torch.arange(8)[None])
after = held(loaded)
print(f"seen:       16-bit model {whole} bytes; packed and loaded {before}; after one forward pass {after}")
raise SystemExit(0 if before < 0.45 * whole and after > 0.95 * whole else 1)
END
