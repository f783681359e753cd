#!/bin/sh
# SDNQ's low-rank branch doubles the groups, and some widths have none.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 diffusers==0.42.1 accelerate==1.12.0 sdnq==0.2.8; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import os
import warnings
from importlib.metadata import version

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"
warnings.filterwarnings("ignore")

import torch
from sdnq import sdnq_post_load_quant
from torch import nn

print("software:   sdnq", version("sdnq"))
print("behavior:   by default int4 has a scale for each 64 inputs, and use_svd=True makes that 128, so that a weight without large")
print("            singular values becomes worse by its low-rank branch; layers of 96 or 160 inputs have one scale for a whole row")
print("most guess: the same groups with and without the branch, and shorter groups where 64 does not divide")


def quantized(inputs: int, svd: bool) -> tuple[int, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 512, bias=False)).bfloat16()
    x = torch.randn(64, inputs).bfloat16()
    wanted = model(x).float()
    sdnq_post_load_quant(model, weights_dtype="int4", use_svd=svd)
    groups = model[0].scale.shape[1] if model[0].scale.dim() == 3 else 1
    error = (model(x).float() - wanted).square().sum()
    return inputs // groups, float(10 * torch.log10(wanted.square().sum() / error))


with torch.no_grad():
    plain, branch = quantized(3072, False), quantized(3072, True)
    odd = [quantized(inputs, False)[0] for inputs in (96, 160)]
print(f"seen:       3072 inputs: a scale for each {plain[0]} ({plain[1]:.2f} dB), with the branch for each {branch[0]} ({branch[1]:.2f} dB);")
print(f"            96 and 160 inputs: for each {odd[0]} and {odd[1]}")
raise SystemExit(0 if (plain[0], branch[0]) == (64, 128) and branch[1] < plain[1] - 0.3 and odd == [96, 160] else 1)
END
