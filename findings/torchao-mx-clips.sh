#!/bin/sh
# MXFP4 and MXFP8 of torchao clip the largest numbers of a block.
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
from importlib.metadata import version

import torch
from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode

print("software:   torchao", version("torchao"))
print("behavior:   with the default way to find a block's scale (FLOOR, the one that the MX specification describes), the largest")
print("            number of a block may pass what the element type holds and is clipped: by up to a quarter in MXFP4, and by")
print("            an eighth in MXFP8, where a plain e4m3 rounds by 1/16 at most. RCEIL does not clip.")
print("most guess: the largest number of a block sets the scale, so it is rounded but never clipped")

block = torch.zeros(1, 32)
block[0, 0] = 7.96875
block = block.bfloat16()
seen = {}
for name, dtype in (("MXFP4", torch.float4_e2m1fn_x2), ("MXFP8", torch.float8_e4m3fn)):
    for mode in (None, ScaleCalculationMode.RCEIL):
        options = {} if mode is None else {"scaling_mode": mode}
        tensor = MXTensor.to_mx(block, dtype, 32, **options)
        seen[name, "default" if mode is None else "RCEIL"] = float(tensor.dequantize(torch.float32)[0, 0])
print(f"seen:       7.96875 ->", ", ".join(f"{name} {mode} {value:g}" for (name, mode), value in seen.items()))
expected = {("MXFP4", "default"): 6.0, ("MXFP4", "RCEIL"): 8.0, ("MXFP8", "default"): 7.0, ("MXFP8", "RCEIL"): 8.0}
raise SystemExit(0 if seen == expected else 1)
END
