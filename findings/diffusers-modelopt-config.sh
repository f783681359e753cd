#!/bin/sh
# diffusers' config for NVIDIA ModelOpt can't be made with a current ModelOpt.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 diffusers==0.42.1 nvidia-modelopt==0.47.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from importlib.metadata import version

warnings.filterwarnings("ignore")
from diffusers import NVIDIAModelOptConfig

print("software:   diffusers", version("diffusers"), "nvidia-modelopt", version("nvidia-modelopt"))
print("behavior:   NVIDIAModelOptConfig(quant_type=...) raises TypeError for every type: it spreads a part of ModelOpt's config as a")
print("            mapping, which is a list now")
print("most guess: the config that diffusers documents, with the newest ModelOpt, quantizes a model")

failed = []
for kind in ("FP8", "INT8", "INT4", "NF4", "NVFP4"):
    try:
        NVIDIAModelOptConfig(quant_type=kind)
        print(f"seen:       {kind}: made")
    except TypeError as error:
        failed.append(kind)
        print(f"seen:       {kind}: TypeError: {error}")
raise SystemExit(0 if len(failed) == 5 else 1)
END
