#!/bin/sh
# Half of the scales of auto-round's symmetric int4 are negative.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 auto-round==0.16.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import warnings
from importlib.metadata import version

import torch

warnings.filterwarnings("ignore")
from auto_round.data_type.int import quant_tensor_rtn_sym

print("software:   auto-round", version("auto-round"))
print("behavior:   symmetric int4 gives a group's largest weight code -8 (0 in the file, whose zero point is 8), whatever its sign: where")
print("            it is positive, the scale is negative")
print("most guess: scales are positive, so that their logarithm, square root or an unsigned type is safe, and a larger code is a")
print("            larger weight")

torch.manual_seed(0)
weight = torch.randn(512, 256)
rounded, scale, zero = quant_tensor_rtn_sym(weight.clone(), bits=4, group_size=64)
groups, again = weight.reshape(-1, 64), rounded.reshape(-1, 64)
scale = scale.reshape(-1)
place = groups.abs().argmax(1, keepdim=True)
largest = groups.gather(1, place)[:, 0]
negative = float((scale < 0).float().mean())
opposite = bool(((scale < 0) == (largest > 0)).all())
held = float(((again.gather(1, place)[:, 0] - largest) / largest).abs().max())
print(f"seen:       {negative:.0%} of the scales are negative, exactly those of groups whose largest weight is positive: {opposite}")
print(f"seen:       the largest weight of a group comes back within {held:.1%}")
raise SystemExit(0 if 0.4 < negative < 0.6 and opposite and held < 0.01 else 1)
END
