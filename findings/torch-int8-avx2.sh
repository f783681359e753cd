#!/bin/sh
# int8 products of torch saturate silently on processors with AVX2 and without VNNI.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed or the processor is no x86 with AVX2.
set -eu
grep -qw avx2 /proc/cpuinfo || exit 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 torchao==0.18.0; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

cat > product.py <<'END'
import logging

import torch

logging.disable(logging.WARNING)
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

torch.manual_seed(0)
a = torch.randint(-128, 128, (64, 256), dtype=torch.int8)
b = torch.randint(-128, 128, (256, 64), dtype=torch.int8)
wrong = (torch._int_mm(a, b) != a.long() @ b.long()).float().mean()
x, layer = torch.randn(256, 512), torch.nn.Linear(512, 512, bias=False)
with torch.no_grad():
    exact = layer(x)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    error = (layer(x) - exact).norm() / exact.norm()
print(f"{float(wrong):.1%} {float(error):.1%}")
END
run() { ONEDNN_MAX_CPU_ISA=$1 venv/bin/python -I product.py 2>/dev/null | tail -1; }
best=$(run DEFAULT)
avx2=$(run AVX2)
venv/bin/python -I -c "
from importlib.metadata import version
print('software:   torch', version('torch'), 'and torchao', version('torchao'))"
echo "behavior:   with AVX2 and no VNNI (processors before about 2020; here by ONEDNN_MAX_CPU_ISA=AVX2), torch._int_mm adds pairs of"
echo "            products in 16 bits, which saturate; a W8A8 linear of torchao inherits that; nothing is said"
echo "most guess: an integer product is exact, or refused"
echo "seen:       wrong numbers of torch._int_mm, error of torchao's int8 linear"
echo "            this processor: $best"
echo "            AVX2:           $avx2"
venv/bin/python -I - "$best" "$avx2" <<'END'
import sys

best, avx2 = ([float(number.strip("%")) for number in text.split()] for text in sys.argv[1:])
print("            (a processor without VNNI itself shows the second line twice)" if best[0] else "")
raise SystemExit(0 if avx2[0] > 10 and avx2[1] > 5 else 1)
END
