#!/bin/sh
# A LoKr of two whole matrices has another scale in peft than in LyCORIS.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 einops==0.8.1 toml==0.10.2 lycoris-lora==4.1.3; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from lycoris.modules.lokr import LokrModule
from peft import LoKrConfig, get_peft_model
from torch import nn

print("software:   peft", version("peft"), "and lycoris-lora", version("lycoris-lora"))
print("behavior:   where no factor of a LoKr is small enough to have a rank, LyCORIS ignores alpha (scale 1, and it writes alpha =")
print("            rank); peft still multiplies by alpha / r. The tensors have the same names and shapes.")
print("most guess: the same method with the same alpha, rank and matrices changes the weight by the same amount")

torch.manual_seed(0)
first, second = torch.randn(4, 4), torch.randn(16, 16)
product = torch.kron(first, second)


def scale(change: torch.Tensor) -> float:
    return round(float((change * product).sum() / (product * product).sum()), 4)


with torch.no_grad():
    layer = nn.Linear(64, 64, bias=False)
    weight = layer.weight.clone()
    module = LokrModule("layer", layer, 1.0, lora_dim=32, alpha=8, factor=4)
    module.lokr_w1.copy_(first)
    module.lokr_w2.copy_(second)
    module.apply_to()
    lycoris = scale(layer(torch.eye(64)).T - weight)
    stored = float(module.state_dict()["alpha"])

    config = LoKrConfig(r=32, alpha=8, decompose_factor=4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config)
    tuner = model.base_model.model[0]
    tuner.lokr_w1["default"].copy_(first)
    tuner.lokr_w2["default"].copy_(second)
    peft = scale(model(torch.eye(64)).T - tuner.base_layer.weight)
print(f"seen:       r = 32, alpha = 8: LyCORIS scales by {lycoris} and stores alpha {stored:g}, peft scales by {peft}")
raise SystemExit(0 if (lycoris, stored, peft) == (1.0, 32.0, 0.25) else 1)
END
