"""What comfy-kitchen makes of files for ComfyUI: read by its layouts, multiplied by its eager operators.

    python -m tools.comfy_core --kitchen FOLDER [NAME ...]

FOLDER holds comfy-kitchen as pip installs it (`pip install --no-deps --target FOLDER comfy-kitchen==0.2.36`, which
ComfyUI 0.38.1 requires). For the embedded demo model and tiny pipelines of each family (NAME: demo, flux, sdxl,
qwen-image, z-image, wan), conversions to comfy-core, in int4 and nvfp4, and to comfy, where the family has it, are read
as `tools.kitchen` says. Printed: the largest difference of a layer's output to svdq's own runtime, and the images of
both against the 16-bit model's, comfy-kitchen's with bfloat16 activations and float32 arithmetic, as its CUDA kernels
compute, and with bfloat16 arithmetic. Exit code 1 where comfy-kitchen's image in float32 is more than a decibel worse
than svdq's or a tensor is left over.

Tiny models have random weights: any size of image shows what their layers make of it, so it is small.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from svdq_cli import load_pipeline
from svdq_cli.checkpoint.reader import Checkpoint, component_in, open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.families.layouts import LAYOUTS
from svdq_cli.inference.load import load_16bit_pipeline
from svdq_cli.metrics.psnr import psnr_db
from svdq_cli.pipelines.generate import generate_one
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.sampling import usual_sampling
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import Calibration, Output, Quantization, default_recipe
from svdq_cli.records import W4A4Solution, ignore_events
from svdq_cli.runtime.linear import quantized_linear
from svdq_cli.runtime.replace import replace_linears
from tests.tiny import tiny_flux_pipeline
from tests.tiny_families import tiny_pipeline
from tools.kitchen import kitchen_layers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

NAMES = ("demo", "flux", "sdxl", "qwen-image", "z-image", "wan")
MOST_APART = 1.0  # dB by which comfy-kitchen's image may be worse
STEPS = 4
PIXELS, FRAMES = 128, 5  # of the tiny models
PROMPT = "a pink rabbit"


@dataclass(frozen=True, slots=True)
class Case:
    """What a model is converted to."""

    title: str
    format: str
    quantization: Quantization

    def calibration(self, name: str) -> Calibration | None:
        """Of as few images as smoothing takes; of the demo in its own size."""
        if self.quantization.effort == "datafree":
            return None
        small = Calibration(samples=2, steps=2, rows=256)
        if name == "demo":
            return small
        return small.model_copy(update={"height": PIXELS, "width": PIXELS, "frames": _frames(name)})

    def has(self, name: str) -> bool:
        """Whether the format has a layout for a model."""
        family = "flux" if name == "demo" else name
        return self.format == "comfy-core" or (family, self.format) in {
            (each.family, each.format) for each in LAYOUTS
        }


CASES = (
    Case("int4", "comfy-core", Quantization(effort="datafree")),
    # calibrated, for a smoothing factor that is not 1
    Case("nvfp4", "comfy-core", Quantization(precision="nvfp4", effort="fast")),
    Case("comfy", "comfy", Quantization(effort="fast", rank=16)),
)


@dataclass(frozen=True, slots=True)
class Result:
    """One model's images: PSNR to the 16-bit model's, in dB, and between the two runtimes."""

    name: str
    layers: int
    difference: float  # largest of a layer, relative
    kitchen_db: float
    bfloat16_db: float  # where its eager operators round every step to bfloat16, as its kernels do not
    own_db: float
    between_db: float

    @property
    def sound(self) -> bool:
        return self.own_db - self.kitchen_db <= MOST_APART


def compared(name: str, case: Case, folder: Path) -> Result:
    """A conversion of a tiny model, run by both."""
    model = "demo" if name == "demo" else str(_pipeline(name, folder / "model"))
    recipe = default_recipe(
        model,
        quantization=case.quantization,
        calibration=case.calibration(name),
        outputs=(Output(format=case.format),),
    )
    prepared_source = source_of(recipe, DEFAULT_OPTIONS)
    file = folder / f"{case.title}.safetensors"
    convert(recipe, file, options=RunOptions(device="cpu"))
    base = prepared_source.pipeline
    assert base is not None
    checkpoint = open_checkpoint(file)
    settings = replace(usual_sampling(prepared_source).settings, steps=STEPS, batch_size=1)
    if name != "demo":
        settings = replace(settings, height=PIXELS, width=PIXELS, frames=_frames(name))

    def drawn(pipe: DiffusionPipeline) -> Image:
        return generate_one(pipe, PROMPT, settings=settings, observe=ignore_events).frames[0]

    original = load_16bit_pipeline(
        prepared_source, class_name=checkpoint.model_class, device=torch.device("cpu")
    )
    exact = drawn(original)
    pipe = load_pipeline(file, base=base, device="cpu", backend="reference")
    own = drawn(pipe)
    layers = kitchen_layers(checkpoint, torch.float32)
    difference = max(_differences(checkpoint, layers))
    component = component_in(base, checkpoint)
    replace_linears(getattr(pipe, component), layers)
    theirs = drawn(pipe)
    replace_linears(getattr(pipe, component), kitchen_layers(checkpoint, torch.bfloat16))
    rounded = drawn(pipe)
    return Result(
        name,
        len(layers),
        difference,
        kitchen_db=psnr_db(theirs, exact),
        bfloat16_db=psnr_db(rounded, exact),
        own_db=psnr_db(own, exact),
        between_db=psnr_db(theirs, own),
    )


def _frames(name: str) -> int | None:
    return FRAMES if name == "wan" else None


def _pipeline(name: str, folder: Path) -> Path:
    return tiny_flux_pipeline(folder) if name == "flux" else tiny_pipeline(name, folder)


def _differences(checkpoint: Checkpoint, layers: Mapping[str, nn.Module]) -> Iterator[float]:
    """Of each layer's outputs for random rows of the size that smoothing expects, relative to their size."""
    generator = torch.Generator().manual_seed(0)
    for plan in checkpoint.layers:
        solution = checkpoint.solution(plan)
        x = torch.randn(64, plan.linear.in_features, generator=generator)
        if isinstance(solution, W4A4Solution):
            x = x * solution.smooth.float()
        unsigned_from = checkpoint.unsigned_from(plan)
        if unsigned_from is not None:
            x = torch.nn.functional.gelu(x, approximate="tanh")
        x = x.to(torch.bfloat16).float()
        own = quantized_linear(solution, unsigned_from=unsigned_from)(x).float()
        yield float((layers[plan.name](x).float() - own).norm() / own.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description="What comfy-kitchen makes of files for ComfyUI")
    parser.add_argument("--kitchen", type=Path, required=True, help="folder with comfy_kitchen in it")
    parser.add_argument("names", nargs="*", default=NAMES)
    said = parser.parse_args()
    sys.path.insert(0, str(said.kitchen.resolve()))
    titles = ("kitchen", "in bf16", "svdq", "between")
    print(f"{'model':12} {'':5} layers  layer differs " + " ".join(f"{title:>9}" for title in titles))
    sound = True
    for name in said.names:
        for case in (case for case in CASES if case.has(name)):
            with tempfile.TemporaryDirectory() as folder:
                found = compared(name, case, Path(folder))
            values = (found.kitchen_db, found.bfloat16_db, found.own_db, found.between_db)
            print(
                f"{found.name:12} {case.title:5} {found.layers:6} {found.difference:14.2%} ",
                *(f"{value:6.2f} dB" for value in values),
                "" if found.sound else "apart",
                flush=True,
            )
            sound = sound and found.sound
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
