#!/bin/sh
# Q4_0 loses an eighth of the largest weight of one sign.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in numpy==2.4.6 gguf==0.19.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType, quants

print("software:   gguf", version("gguf"))
print("behavior:   Q4_0's scale is the number of largest magnitude, with its sign, over -8: that number is held exactly, one of")
print("            the other sign is clipped to 7/8. Of two that are equally large, the first in the block is kept.")
print("most guess: a format without zero points treats both signs alike: +1 and -1 come back as well as each other")


def again(block: np.ndarray, kind: GGMLQuantizationType) -> list[float]:
    return [round(float(x), 4) for x in quants.dequantize(quants.quantize(block, kind), kind)[0, :2]]


signs = np.where(np.arange(32) % 2 == 0, 1.0, -1.0).astype(np.float32)[None]
plus, minus = (again(block, GGMLQuantizationType.Q4_0) for block in (signs, -signs))
eight = again(signs, GGMLQuantizationType.Q8_0)
print(f"seen:       Q4_0: (1, -1) -> {plus}, (-1, 1) -> {minus}; Q8_0: (1, -1) -> {eight}")
raise SystemExit(0 if plus == [1.0, -0.875] and minus == [-1.0, 0.875] and eight[0] == -eight[1] else 1)
END
