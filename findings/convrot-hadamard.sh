#!/bin/sh
# ConvRot's rotation is not the Hadamard matrix that libraries give.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 scipy==1.17.1 packaging==26.0 comfy-kitchen==0.2.40; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from comfy_kitchen.backends.eager.convrot_w4a4 import convrot_w4a4_linear, quantize_convrot_w4a4_weight
from comfy_kitchen.backends.eager.convrot_w4a4 import quantize_signed_int4_rowwise
from scipy.linalg import hadamard

print("software:   comfy-kitchen", version("comfy-kitchen"), "(scipy", version("scipy") + ")")
print("behavior:   a convrot_w4a4 weight is rotated by a regular Hadamard matrix, a Kronecker power of a 4 x 4 one whose rows all")
print("            have the sum 2: a constant row of activations stays constant. A weight that was rotated by the Hadamard matrix of")
print("            scipy (Sylvester's) is multiplied to noise")
print("most guess: Sylvester's matrix, which turns a constant row into one outlier")


def sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


torch.manual_seed(0)
weight, x = torch.randn(128, 512), torch.randn(64, 512)
wanted = x @ weight.T
own = convrot_w4a4_linear(x, *quantize_convrot_w4a4_weight(weight))

sylvester = torch.tensor(hadamard(256), dtype=torch.float32) / 16
rotated = (weight.view(128, 2, 256) @ sylvester.T).reshape(128, 512)
other = convrot_w4a4_linear(x, *quantize_signed_int4_rowwise(rotated))

basis = torch.eye(256)
codes, scales = quantize_convrot_w4a4_weight(basis)
low, high = (codes.to(torch.int32) << 28 >> 28), (codes.to(torch.int32) << 24 >> 28)
matrix = torch.stack([low, high], -1).reshape(256, 256) * scales[:, None]  # the rotation itself: its rows have one magnitude
sums = matrix.sum(-1)
print(f"seen:       SQNR of the product {sqnr(own, wanted):.1f} dB with its own rotation, {sqnr(other, wanted):.1f} dB with scipy's;")
print(f"            sums of the rotation's rows {float(sums.min()):.3f} to {float(sums.max()):.3f}")
regular = float((sums - 1).abs().max()) < 1e-4
raise SystemExit(0 if sqnr(own, wanted) > 10 and sqnr(other, wanted) < 1 and regular else 1)
END
