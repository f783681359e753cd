#!/bin/sh
# The global scale of NVFP4 multiplies in torchao and divides in compressed-tensors.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 torchao==0.18.0 compressed-tensors==0.20.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from compressed_tensors.quantization.utils import generate_gparam
from torchao.prototype.mx_formats.nvfp4_tensor import per_tensor_amax_to_scale

print("software:   compressed-tensors", version("compressed-tensors"), "and torchao", version("torchao"))
print("behavior:   for a tensor with largest number a, compressed-tensors stores 448 * 6 / a as the global scale (weights are")
print("            divided by it), torchao stores a / (448 * 6) (weights are multiplied by it)")
print("most guess: the second scale of NVFP4 is one number, so that files differ in names only")

good = True
for largest in (0.25, 6.0, 100.0):
    divisor = float(generate_gparam(torch.tensor([-largest]), torch.tensor([largest / 2])))
    factor = float(per_tensor_amax_to_scale(torch.tensor(largest)))
    print(f"seen:       a = {largest}: compressed-tensors {divisor:.6g}, torchao {factor:.6g}, product {divisor * factor:.6f}")
    good &= abs(divisor * largest / 2688 - 1) < 1e-5 and abs(divisor * factor - 1) < 1e-5
raise SystemExit(0 if good else 1)
END
