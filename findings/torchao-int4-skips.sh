#!/bin/sh
# torchao leaves layers at 16 bits without a word where the group size does not divide them.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 torchao==0.18.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import logging
import warnings
from importlib.metadata import version

import torch
from torch import nn
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

print("software:   torchao", version("torchao"))
print("behavior:   quantize_ with Int4WeightOnlyConfig(group_size=128) on a layer of 96 inputs changes nothing, raises nothing,")
print("            and says nothing at Python's default log level. IntxWeightOnlyConfig raises an error for the same layer.")
print("most guess: an error, or a shorter last group; and the same in both")

messages: list[str] = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger().addHandler(handler)

layer = nn.Sequential(nn.Linear(96, 64)).bfloat16()
before = layer[0].weight
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    quantize_(layer, Int4WeightOnlyConfig(group_size=128))
untouched = type(layer[0].weight) is nn.Parameter and torch.equal(layer[0].weight, before)
said = [str(w.message) for w in warned if "group" in str(w.message)] + [m for m in messages if "group" in m]

raised = ""
try:
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(128)))
except Exception as error:
    raised = f"{type(error).__name__}: {error}"
print(f"seen:       Int4: weight untouched: {untouched}, warnings: {said}; Intx: {raised}")
raise SystemExit(0 if untouched and not said and raised else 1)
END
