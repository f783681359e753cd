#!/bin/sh
# An untrained PiSSA or OLoRA adapter holds half of the weight, and unload() does not give the weight back.
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
import copy
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

print("software:   peft", version("peft"))
print("behavior:   PiSSA and OLoRA take the product of the fresh adapter out of the base weight. The saved file has LoRA's usual")
print("            keys, but B @ A is a large part of the weight before any training: W + B @ A is wrong. peft makes it right by")
print("            changing the base again when it loads the folder; unload() and disable_adapter() leave the base changed.")
print("most guess: an untrained LoRA changes nothing, every file with lora_A and lora_B is merged by adding B @ A, and unload()")
print("            returns the model that was loaded")

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(64, 64, bias=False))
weight, probe = base[0].weight.detach(), torch.eye(64)
size, good = float(weight.norm()), True
for init in ("pissa", "olora", True):
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights=init)
    get_peft_model(copy.deepcopy(base), config).save_pretrained("adapter")
    tensors = load_file("adapter/adapter_model.safetensors")
    down = next(value for key, value in tensors.items() if key.endswith("lora_A.weight"))
    up = next(value for key, value in tensors.items() if key.endswith("lora_B.weight"))
    added = float((up @ down).norm()) / size

    with torch.no_grad():
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), "adapter")
        active = float((loaded(probe).T - weight).norm()) / size
        with loaded.disable_adapter():
            disabled = float((loaded(probe).T - weight).norm()) / size
        unloaded = float((loaded.unload()[0].weight - weight).norm()) / size
    print(f"seen:       {init!s:5}: |B A| {added:.2f} of |W|; change of the layer when loaded {active:.2f},", end=" ")
    print(f"disabled {disabled:.2f}, unloaded {unloaded:.2f}")
    large = init is not True
    good &= active < 1e-5 and all((value > 0.3) == large for value in (added, disabled, unloaded))
raise SystemExit(0 if good else 1)
END
