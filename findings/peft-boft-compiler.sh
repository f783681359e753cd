#!/bin/sh
# Making a BOFT adapter changes the compiler of the whole process.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset CC CXX
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.12.0 peft==0.21.2; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

# An empty PATH: there is no ninja, so the extension can't be built on any machine
PATH=/nonexistent "$work/venv/bin/python" -I - <<'END'
import os
import warnings
from importlib.metadata import version

from peft import BOFTConfig, get_peft_model
from torch import nn

warnings.filterwarnings("ignore")
print("software:   peft", version("peft"))
print("behavior:   where BOFT's CUDA extension can't be built, CC and CXX of the process are gcc afterwards, for whatever compiles")
print("            C++ later in it: a driver that does not link C++'s standard library")
print("most guess: the environment is as before")

before = os.environ.get("CC"), os.environ.get("CXX")
get_peft_model(nn.Sequential(nn.Linear(8, 8)), BOFTConfig(boft_block_size=4, target_modules=["0"]))
after = os.environ.get("CC"), os.environ.get("CXX")
print(f"seen:       CC and CXX before: {before}, after: {after}")
raise SystemExit(0 if before == (None, None) and after == ("gcc", "gcc") else 1)
END
