#!/bin/sh
# transformers does not load the asymmetric int4 that compressed-tensors writes.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 accelerate==1.12.0 transformers==5.24.0 compressed-tensors==0.20.0; do
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
print("behavior:   a model with symmetric=False, compressed and saved by ModelCompressor, does not load: its zero points are stored")
print("            packed, eight rows in a word, and from_pretrained expects a number for each row. symmetric=True loads")
print("most guess: both load")


def loads(symmetric: bool) -> str:
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16, vocab_size=64)).to(torch.bfloat16)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=64)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=args)}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.data.view(len(module.weight), -1, 64)
            scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            module.weight_scale.data.copy_(scale)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = f"symmetric-{symmetric}"
    model.save_pretrained(folder)
    compressor.update_config(folder)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "loads"


symmetric, asymmetric = loads(True), loads(False)
print("seen:       symmetric:", symmetric)
print("            asymmetric:", asymmetric.splitlines()[0][:110])
raise SystemExit(0 if symmetric == "loads" and "mismatched_sizes" in asymmetric else 1)
END
