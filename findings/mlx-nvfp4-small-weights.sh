#!/bin/sh
# MLX's nvfp4 has no scale for the whole tensor: small weights are off more, and smaller ones are all zeros. torchao's tensor class too.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 torchao==0.18.0 'mlx[cpu]==0.32.4'; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

code=0
venv/bin/python -I - >output 2>/dev/null <<'END' || code=$?
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

print("software:   mlx", version("mlx"), "and torchao", version("torchao"))
print("behavior:   nvfp4's scales are e4m3 and end at 0.002. MLX's `quantize`, and its layers, put no scale of the whole tensor before them")
print("            unless they are given one: the smaller the weights, the larger the error, until every weight is zero. torchao's")
print("            `to_nvfp4` does the same, but its configs do give one.")
print("most guess: a weight times a constant has the same relative error, as with affine and mxfp4")

numbers = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
sizes = (1.0, 0.02, 0.005, 0.001)


def error(found, exact):
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def by_mlx(exact, mode, **more):
    parts = mx.quantize(mx.array(exact), mode=mode, **more)
    return error(np.array(mx.dequantize(*parts, mode=mode, **more).astype(mx.float32)), exact)


def by_torchao(exact):
    return error(NVFP4Tensor.to_nvfp4(torch.from_numpy(exact)).dequantize(torch.float32).numpy(), exact)


nvfp4 = [by_mlx(numbers * size, "nvfp4") for size in sizes]
scaled = [by_mlx(numbers * size, "nvfp4", global_scale=mx.array(abs(numbers * size).max())) for size in sizes]
others = [by_mlx(numbers * size, mode) for size in sizes for mode in ("affine", "mxfp4")]
torchao = [by_torchao(numbers * size) for size in sizes]
layer = nn.Linear(1024, 256, bias=False)
layer.weight = mx.array(numbers * 0.001)
out = nn.QuantizedLinear.from_linear(layer, mode="nvfp4", bits=4, group_size=16)(mx.ones((1, 1024)))

print("seen:       Gaussian weights of standard deviation", ", ".join(f"{size:g}" for size in sizes))
for name, errors in (("MLX", nvfp4), ("MLX, global_scale given", scaled), ("torchao, to_nvfp4", torchao)):
    print(f"            {name}: off by", ", ".join(f"{each:.1%}" for each in errors))
print(f"            MLX affine and mxfp4: off by {min(others):.1%} to {max(others):.1%}, whatever the size")
print(f"            output of MLX's layer of the last: {float(abs(out).max()):g}")
raise SystemExit(
    0
    if nvfp4[0] < nvfp4[1] < nvfp4[2] < nvfp4[3] == 1
    and max(scaled) < 0.1
    and max(others) < 0.13
    and torchao[1] > 1.2 * torchao[0]
    and torchao[3] > 0.99
    and not float(abs(out).max())
    else 1
)
END
grep -E "^(software|behavior|most guess|seen): |^            [a-zA-Z\`]" output
exit $code
