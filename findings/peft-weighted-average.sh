#!/bin/sh
# The "linear" combination of two LoRAs in peft is not the combination of what they do.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

print("software:   peft", version("peft"))
print("behavior:   add_weighted_adapter(combination_type='linear') adds the A matrices and the B matrices, each by the root of its")
print("            weight. The product then has the cross terms B1 A2 and B2 A1, as large as what was asked for. 'cat' is exact;")
print("            'svd', the default, cuts the rank to the largest of the two.")
print("most guess: weights of 0.5 and 0.5 give half of one change and half of the other")

torch.manual_seed(0)
model = get_peft_model(
    nn.Sequential(nn.Linear(64, 64, bias=False)),
    LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False),
    adapter_name="one",
)
model.add_adapter("two", LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False))
weight = model.base_model.model[0].base_layer.weight


@torch.no_grad()
def change(name: str) -> torch.Tensor:
    model.set_adapter(name)
    return model(torch.eye(64)).T - weight


wanted = 0.5 * change("one") + 0.5 * change("two")
errors = {}
for kind in ("cat", "svd", "linear"):
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], kind, combination_type=kind)
    errors[kind] = float((change(kind) - wanted).norm() / wanted.norm())
print("seen:       error relative to the change:", ", ".join(f"{kind} {error:.3f}" for kind, error in errors.items()))
raise SystemExit(0 if errors["cat"] < 1e-5 and 0.2 < errors["svd"] < errors["linear"] and errors["linear"] > 0.7 else 1)
END
