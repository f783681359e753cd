"""How near the layers of comfy-core files come, beside those of the tools that others write files for ComfyUI with.

    python -m tools.comfy_layers --kitchen FOLDER --ctq FOLDER [--iterations N]

FOLDERs as pip installs them (`pip install --no-deps --target FOLDER comfy-kitchen==0.2.36`; for the other
`convert-to-quant==1.3.4 prodigy-plus-schedule-free`). The embedded demo model is calibrated on its calibration prompts,
and converted by every method; each W4A4 layer is then run on inputs that other prompts give it, by comfy-kitchen's
eager operators in float32, whoever quantized it. Printed: SQNR of the layers' outputs against those of the 16-bit
weights. Exit code 1 where svdq is not 1.5 dB nearer on average than the others in the same format.

convert-to-quant writes no `convrot_w4a4`: in four bits it writes nvfp4, to nearest or with its learned rounding, and
it rotates for int8 alone, whose files are twice as large. Of rotated int4 layers, comfy-kitchen's own quantizer is
compared with: what ComfyUI makes of a weight that it quantizes itself.
"""

# comfy-kitchen and convert-to-quant are in folders of their own
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.calibration.artefact import Calibration as Artefact
from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.prepare import Prepared, prepare
from svdq_cli.prepare.sampling import with_model_sampling
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import Calibration, Output, Quantization, Recipe, default_recipe
from svdq_cli.records import RotatedPlan, W4A4Plan
from svdq_cli.source import read_tensor
from tools.kitchen import KitchenModule, kitchen_layers, kitchen_modules

LEAST_GAIN = 1.5  # dB on average
HELD_OUT = 16  # prompts
MOST_ROWS = 1024  # of a layer's input
CPU = RunOptions(device="cpu")
Outputs = Mapping[str, Callable[[Tensor], Tensor]]  # by layer: (M, K) -> (M, N) without the bias


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's weight (N, K), and an input (M, K) that no method has seen."""

    name: str
    weight: Tensor
    rows: Tensor


def recipe_of(precision: str, *, effort: str = "balanced") -> Recipe:
    """The demo as a comfy-core file."""
    quantization = Quantization.model_validate({"precision": precision, "effort": effort})
    return default_recipe("demo", quantization=quantization, outputs=(Output(format="comfy-core"),))


def layers_of(prepared: Prepared, held_out: Artefact) -> Iterator[Layer]:
    """The layers with 4-bit activations."""
    for group in prepared.plan.layer_groups(data_free=False):
        for name in group.layers:
            if isinstance(prepared.plan.by_name[name], RotatedPlan | W4A4Plan):
                rows = held_out.stats(group.name).rows
                step = max(1, len(rows) // MOST_ROWS)
                yield Layer(name, read_tensor(prepared.source, f"{name}.weight").float(), rows[::step])


def sqnr_db(layer: Layer, quantized: Callable[[Tensor], Tensor]) -> float:
    """Of the outputs, in dB."""
    exact = layer.rows.float() @ layer.weight.T
    noise = exact - quantized(layer.rows).float()
    return float(10 * torch.log10(exact.square().sum() / noise.square().sum()))


# ------------------------------------------------------------------------------------------------- methods


def svdq(precision: str, calibration: Path, folder: Path) -> Outputs:
    """This project's file."""
    file = folder / f"svdq-{precision}.safetensors"
    convert(recipe_of(precision), file, calibration=calibration, options=CPU)
    layers = kitchen_layers(open_checkpoint(file), torch.float32)
    for layer in layers.values():
        layer.module[0].bias = None
    return layers


def comfy_kitchen(layers: list[Layer]) -> Outputs:
    """Rotated, and rounded to nearest with the largest magnitude of a row as its scale."""
    from comfy_kitchen import tensor as kitchen

    found: dict[str, KitchenModule] = {}
    for layer in layers:
        rotation = next(size for size in (256, 64, 16) if layer.weight.shape[1] % size == 0)
        made = kitchen.QuantizedTensor.from_float(
            layer.weight, "TensorCoreConvRotW4A4Layout", convrot_groupsize=rotation
        )
        found[layer.name] = KitchenModule(made)
    return found


def convert_to_quant(layers: list[Layer], folder: Path, paths: list[Path], *options: str) -> Outputs:
    """nvfp4, by convert-to-quant's own command."""
    given, made = folder / "weights.safetensors", folder / "ctq.safetensors"
    save_file({f"{layer.name}.weight": layer.weight.bfloat16() for layer in layers}, given)
    command = [sys.executable, "-m", "convert_to_quant.convert_to_quant", "-i", given, "-o", made]
    command += ["--nvfp4", "--comfy_quant", "--device", "cpu", "--manual_seed", "0", *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"convert-to-quant failed:\n{done.stderr[-2000:]}")
    return kitchen_modules(made, torch.float32)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description="comfy-core's layers beside those of other tools")
    parser.add_argument("--kitchen", type=Path, required=True, help="folder with comfy_kitchen in it")
    parser.add_argument("--ctq", type=Path, required=True, help="folder with convert_to_quant in it")
    parser.add_argument("--iterations", type=int, default=500, help="of its learned rounding, a layer")
    said = parser.parse_args()
    paths = [said.kitchen.resolve(), said.ctq.resolve()]
    sys.path.insert(0, str(paths[0]))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        seen = default_recipe("demo", calibration=Calibration())
        calibrate(seen, folder / "calibration", options=CPU)
        others = default_recipe("demo", calibration=Calibration(samples=HELD_OUT))
        others = with_model_sampling(others, source_of(others, DEFAULT_OPTIONS), held_out=True)
        calibrate(others, folder / "held-out", options=CPU)
        layers = list(layers_of(prepare(recipe_of("int4")), open_calibration(folder / "held-out")))
        print(f"{len(layers)} layers, {HELD_OUT} held-out prompts\n{'':44} mean    worst")

        def shown(title: str, outputs: Outputs) -> float:
            found = [sqnr_db(layer, outputs[layer.name]) for layer in layers if layer.name in outputs]
            print(f"{title:42} {fmean(found):6.2f} {min(found):6.2f} dB  ({len(found)} layers)", flush=True)
            return fmean(found)

        nearest = shown("convrot_w4a4, comfy-kitchen's quantizer", comfy_kitchen(layers))
        rotated = shown("convrot_w4a4, svdq", svdq("int4", folder / "calibration", folder))
        learned = ("--num_iter", str(said.iterations))
        simple = shown(
            "nvfp4, convert-to-quant --simple", convert_to_quant(layers, folder, paths, "--simple")
        )
        rounded = shown("nvfp4, convert-to-quant", convert_to_quant(layers, folder, paths, *learned))
        smoothed = shown("nvfp4, svdq", svdq("nvfp4", folder / "calibration", folder))
    gains = {"convrot_w4a4": rotated - nearest, "nvfp4": smoothed - max(simple, rounded)}
    for name, gain in gains.items():
        print(f"{name}: {gain:+.2f} dB{'' if gain >= LEAST_GAIN else '  too little'}")
    return 0 if min(gains.values()) >= LEAST_GAIN else 1


if __name__ == "__main__":
    raise SystemExit(main())
