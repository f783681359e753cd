#!/bin/sh
# Whether ComfyUI's rotated int4 layer quantizes its input depends on the input's strides.
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
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor

print("software:   comfy-kitchen", version("comfy-kitchen"), "and torch", version("torch"))
print("behavior:   of a convrot_w4a4 layer without a bias, a contiguous input (1, M, K) is quantized to 4 bits or left at 16, by")
print("            the stride of its axis of length 1, which addresses nothing; an attention's output that was cut from a longer one")
print("            has such a stride")
print("most guess: equal numbers in contiguous tensors give equal results")

torch.manual_seed(0)
rows, weight = torch.randn(512, 256), torch.randn(256, 256) / 16
layer = QuantizedTensor.from_float(weight, "TensorCoreConvRotW4A4Layout")
dequantized = rows @ layer.dequantize().T
whole = rows.unsqueeze(0)
cut = torch.cat([rows, rows]).unsqueeze(0)[:, :512]
with torch.no_grad():
    far = [float((F.linear(x, layer)[0] - dequantized).norm() / dequantized.norm()) for x in (whole, cut)]
print("seen:       both inputs equal:", torch.equal(whole, cut), "- both contiguous:", whole.is_contiguous() and cut.is_contiguous())
print(f"            strides {whole.stride()}: {far[0]:.1%} from the product of 16-bit inputs with the dequantized weight")
print(f"            strides {cut.stride()}: {far[1]:.1%}")
raise SystemExit(0 if far[0] > 0.05 and far[1] < 1e-5 else 1)
END
