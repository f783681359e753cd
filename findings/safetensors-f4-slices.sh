#!/bin/sh
# safetensors reads a whole 4-bit float tensor, but no part of it.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 safetensors==0.8.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

import torch
from safetensors import safe_open
from safetensors.torch import save_file

print("software:   safetensors", version("safetensors"), "and torch", torch.__version__.split("+")[0])
print("behavior:   a float4_e2m1fn_x2 tensor is written with dtype F4 and the shape in numbers, not in bytes, and is read")
print("            back whole; get_slice fails on every slice of it, even [:]. The same bytes as uint8 can be sliced.")
print("most guess: what get_tensor reads can be sliced, as every other dtype can, at least along the first axis")

codes = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
save_file({"f4": codes.clone().view(torch.float4_e2m1fn_x2), "u8": codes}, "a.safetensors")
with safe_open("a.safetensors", "pt") as file:
    whole = torch.equal(file.get_tensor("f4").view(torch.uint8), codes)
    part = file.get_slice("f4")
    shape, dtype = part.get_shape(), part.get_dtype()
    bytes_sliced = torch.equal(file.get_slice("u8")[1:3], codes[1:3])
    errors = []
    for index in (slice(1, 3), slice(None)):
        try:
            part[index]
        except RuntimeError as error:
            errors.append(str(error))
print(f"seen:       saved {tuple(codes.shape)}, stored as {dtype} {tuple(shape)}; whole read equal: {whole};")
print(f"            uint8 slice equal: {bytes_sliced}; F4 slices: {errors}")
raise SystemExit(0 if whole and bytes_sliced and (dtype, shape) == ("F4", [4, 16]) and len(errors) == 2 else 1)
END
