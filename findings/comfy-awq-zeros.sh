#!/bin/sh
# The zero points of ComfyUI's awq_w4a16 are no codes.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 packaging==26.0 comfy-kitchen==0.2.40; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from comfy_kitchen.backends.eager.awq import gemv_awq_w4a16

print("software:   comfy-kitchen", version("comfy-kitchen"))
print("behavior:   awq_w4a16 computes (code - 8) * scale + zero: `weight_zeros` are offsets in units of the weight, and code 8 stands")
print("            for them")
print("most guess: (code - zero) * scale, as AWQ's and GPTQ's files have it")

codes = torch.arange(16, dtype=torch.int32)
packed = (codes[0::2] | codes[1::2] << 4).to(torch.uint8).view(torch.int8).repeat(4)[None]  # (1, 32): 0..15, four times
scale, zero = torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)
rows = gemv_awq_w4a16(torch.eye(64), packed, scale, zero)[:16, 0]
print("seen:       codes 0, 8, 15 with scale 2 and zero 3 are the weights", [float(rows[code]) for code in (0, 8, 15)])
print("            by AWQ's formula they would be", [2.0 * (code - 3) for code in (0, 8, 15)])
raise SystemExit(0 if torch.equal(rows, (codes - 8) * 2.0 + 3.0) else 1)
END
