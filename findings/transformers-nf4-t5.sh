#!/bin/sh
# A T5 that transformers loads in 4 bits keeps a fifth of its weights at 16: the layer `wo` of every block.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 bitsandbytes==0.50.2; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

code=0
venv/bin/python -I - >output 2>/dev/null <<'END' || code=$?
from importlib.metadata import version

import torch
from transformers import BitsAndBytesConfig, T5Config, T5EncoderModel

print("software:   transformers", version("transformers"), "and bitsandbytes", version("bitsandbytes"))
print("behavior:   T5 lists `wo` as a layer that a float16 model keeps in float32. Quantizers leave such layers out of any model, so that")
print("            `wo` of a bfloat16 model stays at 16 bits; neither the config nor a message says so")
print("most guess: `load_in_4bit` makes every linear layer 4-bit but a language model's head")

torch.manual_seed(0)
sizes = {"d_model": 256, "d_ff": 640, "d_kv": 64, "num_heads": 4, "num_layers": 2}  # the ratios of T5-XXL
config = T5Config(**sizes, vocab_size=128, feed_forward_proj="gated-gelu", is_encoder_decoder=False)
T5EncoderModel(config).to(torch.bfloat16).save_pretrained("t5")


def layers(**how):
    model = T5EncoderModel.from_pretrained("t5", dtype=torch.bfloat16, **how)
    found = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    return model, found


_, plain = layers()
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
model, quantized = layers(quantization_config=four_bit)
kept = [name for name, each in quantized.items() if each.weight.dtype != torch.uint8]
share = sum(plain[name].weight.numel() for name in kept) / sum(each.weight.numel() for each in plain.values())
skipped = model.config.quantization_config.to_dict().get("llm_int8_skip_modules")
print("seen:       dtype of `wo` in the bfloat16 model", plain[kept[0]].weight.dtype)
print("            at 16 bits in the 4-bit model:", ", ".join(kept))
of_bytes = share * 16 / (share * 16 + (1 - share) * 4)
print(f"            {share:.0%} of the linear layers' weights, {of_bytes:.0%} of their bytes; the config's list of such layers: {skipped}")
expected = [f"encoder.block.{index}.layer.1.DenseReluDense.wo" for index in range(2)]
raise SystemExit(0 if kept == expected and plain[kept[0]].weight.dtype == torch.bfloat16 and not skipped else 1)
END
grep -E "^(software|behavior|most guess|seen): |^            [a-zA-Z0-9\`]" output
exit $code
