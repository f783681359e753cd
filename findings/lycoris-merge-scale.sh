#!/bin/sh
# lycoris-lora merges LoHa and LoKr with alpha / rank applied twice.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 einops==0.8.1 toml==0.10.2 lycoris-lora==4.1.3; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

print("software:   lycoris-lora", version("lycoris-lora"))
print("behavior:   with alpha = rank / 2, LoHa and LoKr modules change a layer's output by alpha / rank times their product, but")
print("            merge_to adds only (alpha / rank)^2 times it to the weight; LoCon (plain LoRA) merges what it computes")
print("most guess: a merged layer computes what the layer with the module beside it computed")

torch.manual_seed(0)
seen = {}
for kind, options in ((LoConModule, {}), (LohaModule, {}), (LokrModule, {"factor": 4})):
    layer = nn.Linear(256, 256, bias=False)
    weight = layer.weight.detach().clone()
    module = kind("layer", layer, 1.0, lora_dim=4, alpha=2, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
        module.apply_to()
        forward = layer(torch.eye(256)).T - weight
        module.restore()
        module.merge_to(1.0)
        merged = layer.weight - weight
    seen[kind.__name__] = round(float((merged * forward).sum() / (forward * forward).sum()), 3)
print(f"seen:       merged change over the forward's change: {seen}")
raise SystemExit(0 if seen == {"LoConModule": 1.0, "LohaModule": 0.5, "LokrModule": 0.5} else 1)
END
