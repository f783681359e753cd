#!/bin/sh
# FlowMatchEulerDiscreteScheduler applies its shift to the last sigma twice.
# Exit codes: 0 as stated, 1 the behavior changed, 2 the packages could not be installed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python3 -m venv venv
for package in torch==2.13.0 numpy==2.4.6 diffusers==0.42.1; do
    venv/bin/pip install --quiet --quiet --no-compile --disable-pip-version-check "$package" || exit 2
done

venv/bin/python -I - <<'END'
from importlib.metadata import version

from diffusers import FlowMatchEulerDiscreteScheduler

print("software:   diffusers", version("diffusers"))
print("behavior:   set_timesteps takes the least sigma, which was shifted when the scheduler was made, as the unshifted end of the")
print("            steps, and shifts it again: with shift 3, the last step starts from 0.0089 instead of 0.0030, and")
print("            set_timesteps(1000) does not give the 1000 sigmas that the scheduler was made with")
print("most guess: as many steps as the model was trained with are the sigmas that it was trained with")

good = True
for shift in (1.0, 3.0):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    trained = scheduler.sigmas.clone()
    scheduler.set_timesteps(1000)
    steps = scheduler.sigmas[:-1]
    last = float(steps[-1])
    once = shift * 0.001 / (1 + (shift - 1) * 0.001)
    twice = shift * once / (1 + (shift - 1) * once)
    gap = float((steps - trained).abs().max())
    print(f"seen:       shift {shift:g}: last sigma {last:.5f} (shifted once {once:.5f}, twice {twice:.5f}),", end=" ")
    print(f"largest distance from training {gap:.5f}")
    good &= abs(last - twice) < 1e-5 and (gap < 1e-6) == (shift == 1.0)
raise SystemExit(0 if good else 1)
END
