#!/bin/sh
# "fp4" of bitsandbytes is not E2M1, the 4-bit float of NVFP4 and MXFP4.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 bitsandbytes==0.50.2; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from bitsandbytes import functional

print("software:   bitsandbytes", version("bitsandbytes"))
print("behavior:   the eight magnitudes of quant_type='fp4', scaled by 12, are 0, 1/16, 2, 3, 4, 6, 8, 12: where E2M1 has 1,")
print("            there is 0.0625. Codes are not in the order of the values either, and a byte's first weight is in its")
print("            high half.")
print("most guess: fp4 is E2M1 (0, 1, 2, 3, 4, 6, 8, 12 twelfths), code 1 the smallest, 7 the largest")

weight = torch.zeros(1, 64)
weight[0, 0] = 1.0
weight[0, 2] = 1.0 / 12  # a value that E2M1 holds exactly
packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
table = [round(12 * value, 4) for value in state.code[:8].tolist()]
again = functional.dequantize_4bit(packed, state)[0, :3].tolist()
first = int(packed.flatten()[0])
print(f"seen:       12 x table {table}")
print(f"            1/12 = {1 / 12:.4f} comes back as {again[2]:.4f}; weights (1, 0) are the byte {first:#04x}")
right = table == [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0] and first == 0x30 and again[0] == 1.0
raise SystemExit(0 if right and abs(again[2] - 1 / 12) > 0.07 else 1)
END
