#!/bin/sh
# peft converts a DoRA to a LoRA without its magnitudes.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 peft==0.21.2; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - 2>/dev/null <<'END'
import copy
from importlib.metadata import version

import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, save_as_lora

print("software:   peft", version("peft"))
print("behavior:   save_as_lora of a DoRA writes its two matrices alone, at any rank, without a word: the lengths of the columns that it")
print("            learned are gone; other adapters are refused where they can't be converted")
print("most guess: at full rank the conversion is exact, as it is for LoHa, or it is refused")

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(64, 64))
x = torch.randn(8, 64)


def lost(config):
    model = get_peft_model(copy.deepcopy(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        trained = model(x)
        save_as_lora("converted", model, rank=64)
        converted = PeftModel.from_pretrained(copy.deepcopy(base), "converted")(x)
        return float((converted - trained).norm() / (trained - base(x)).norm())


loha = lost(LoHaConfig(r=4, alpha=4, target_modules=["0"]))
dora = lost(LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["0"]))
print(f"seen:       of what the adapter does, the LoRA of rank 64 for a 64 x 64 layer lacks {loha:.2%} (LoHa), {dora:.0%} (DoRA)")
raise SystemExit(0 if loha < 1e-4 and dora > 0.2 else 1)
END
