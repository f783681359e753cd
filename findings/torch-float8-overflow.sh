#!/bin/sh
# What torch makes of numbers that an 8-bit float does not hold differs from type to type.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 ml-dtypes==0.6.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
import math
from importlib.metadata import version

import ml_dtypes
import numpy as np
import torch

print("software:   torch", torch.__version__.split("+")[0], "against ml_dtypes", version("ml_dtypes"))
print("behavior:   torch's cast to float8_e4m3fn saturates, infinity included; to float8_e5m2 it overflows to infinity, to")
print("            float8_e4m3fnuz to NaN. The cast to float8_e8m0fnu drops signs, and takes 0 to 2^-127. ml_dtypes gives")
print("            NaN for all but e5m2.")
print("most guess: one rule for all, and the same one in both: NaN, as e4m3fn has no infinity and e8m0 no sign and no 0")


def cast(values: list[float], dtype: str) -> tuple[list[float], list[float]]:
    """The values after a round trip through the type, in torch and in ml_dtypes."""
    with np.errstate(all="ignore"):
        other = np.array(values, np.float32).astype(getattr(ml_dtypes, dtype)).astype(np.float32)
    return torch.tensor(values).to(getattr(torch, dtype)).float().tolist(), other.tolist()


def same(left: list[float], right: list[float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(left, right, strict=True))


NAN, INF = math.nan, math.inf
cases = [
    ("float8_e4m3fn", [500.0, 1e6, INF, -INF], [448.0, 448.0, 448.0, -448.0], [NAN] * 4),
    ("float8_e4m3fnuz", [500.0, 1e6, INF, -INF], [NAN] * 4, [NAN] * 4),
    ("float8_e5m2", [1e6, INF, -INF], [INF, INF, -INF], [INF, INF, -INF]),
    ("float8_e8m0fnu", [-1.0, -3.0, 0.0], [1.0, 4.0, 2.0**-127], [NAN] * 3),
]
good = True
for dtype, values, in_torch, in_ml_dtypes in cases:
    ours, theirs = cast(values, dtype)
    print(f"seen:       {dtype:16} {values} -> torch {ours}, ml_dtypes {theirs}")
    good &= same(ours, in_torch) and same(theirs, in_ml_dtypes)
raise SystemExit(0 if good else 1)
END
