#!/bin/sh
# AMD Quark's SVDQuant searches smoothing factors and then takes them out again: activations are quantized as they come.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 amd-quark==0.13; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

code=0
venv/bin/python -I - >output 2>/dev/null <<'END' || code=$?
from importlib.metadata import version

import torch
from quark.torch import ModelQuantizer
from quark.torch.algorithm.svdquant.svdquant import build_quant_layer_config
from quark.torch.quantization.config.config import QConfig, SVDQuantConfig

print("software:   amd-quark", version("amd-quark"), "and torch", version("torch"))
print("behavior:   after its search for smoothing factors, SVDQuant divides weight and branch by them again and stores none, so that an")
print("            input's outlier channels meet the 4-bit quantizer in full")
print("most guess: as in the paper: the input is divided, the weight takes the outliers over and the branch takes them in")


class Model(torch.nn.Module):
    device = torch.device("cpu")

    def __init__(self, weight):
        super().__init__()
        self.layer = torch.nn.Linear(512, 512, bias=False)
        self.layer.weight = torch.nn.Parameter(weight.clone())

    def forward(self, x):
        return self.layer(x)


torch.manual_seed(0)
weight = (torch.randn(512, 512) / 16).bfloat16()
outliers = torch.ones(512)
outliers[::37] = 30
calibration = [(torch.randn(64, 512) * outliers).bfloat16() for _ in range(8)]
x = (torch.randn(256, 512) * outliers).bfloat16()
exact = x.float() @ weight.float().T


def error(weight, inputs, x, algorithms):
    config = QConfig(global_quant_config=build_quant_layer_config("w4a4"), algo_config=algorithms)
    model = ModelQuantizer(config).quantize_model(Model(weight), inputs)
    with torch.no_grad():
        return float((model(x).float() - exact).norm() / exact.norm())


plain = error(weight, calibration, x, None)
svdquant = error(weight, calibration, x, [SVDQuantConfig(alpha_candidates=[0.25, 0.5, 0.75])])
s = outliers**0.7
by_hand = [(inputs / s).bfloat16() for inputs in calibration]
smoothed = error((weight * s).bfloat16(), by_hand, (x / s).bfloat16(), [SVDQuantConfig(alpha_candidates=[0.5])])
print("seen:       error of one linear layer, int4 weights and activations, every 37th input channel 30 times as large")
print(f"            plain {plain:.1%}, SVDQuant of rank 32 {svdquant:.1%}, the same after smoothing by hand {smoothed:.1%}")
raise SystemExit(0 if 2 * smoothed < svdquant < plain else 1)
END
grep -E "^(software|behavior|most guess|seen): |^            [a-z]" output
exit $code
