#!/bin/sh
# comfy-kitchen and torchao write the two halves of an NVFP4 byte the other way round.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 packaging==26.4 torchao==0.18.0 comfy-kitchen==0.2.40; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import comfy_kitchen
import torch
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

print("software:   comfy-kitchen", version("comfy-kitchen"), "and torchao", version("torchao"))
print("behavior:   of two neighboring weights, comfy-kitchen's NVFP4 has the first in the byte's high half by default, torchao's")
print("            in the low half. comfy-kitchen's int4 (SVDQuant, AWQ) has it in the low half.")
print("most guess: NVFP4 is one format: the same weights give the same bytes; and one library has one order")

weight = torch.zeros(16, 64)
weight[0, :4] = torch.tensor([6.0, 0.5, 1.0, 2.0])
kitchen, _ = comfy_kitchen.quantize_nvfp4(weight.bfloat16(), torch.tensor(1.0))
torchao = NVFP4Tensor.to_nvfp4(weight).qdata
theirs, others = kitchen.view(torch.uint8)[0, :2].tolist(), torchao.view(torch.uint8)[0, :2].tolist()

# W = (code - 8) * scale + zero; a one-hot input picks the first weight of the byte 0xF8 or the second
hot = torch.eye(64)[:2]
awq = comfy_kitchen.gemv_awq_w4a16(
    hot.bfloat16(),
    torch.full((8, 32), 0xF8 - 256, dtype=torch.int8),
    torch.ones(1, 8, dtype=torch.bfloat16),
    torch.zeros(1, 8, dtype=torch.bfloat16),
)[:, 0].tolist()
print(f"seen:       weights 6, 0.5, 1, 2: comfy-kitchen {[f'{b:#04x}' for b in theirs]}, torchao {[f'{b:#04x}' for b in others]}")
print(f"            comfy-kitchen's int4 byte 0xf8 is the weights {awq}")
raise SystemExit(0 if theirs == [0x71, 0x24] and others == [0x17, 0x42] and awq == [0.0, 7.0] else 1)
END
