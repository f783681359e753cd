"""What comfy-kitchen makes of comfy-core files: read by its layouts, multiplied by its eager operators.

    python -m tools.comfy_core --kitchen FOLDER [NAME ...]

FOLDER holds comfy-kitchen as pip installs it (`pip install --no-deps --target FOLDER comfy-kitchen==0.2.36`, which
ComfyUI 0.38.1 requires). For the embedded demo model and tiny pipelines of each family (NAME: demo, flux, sdxl,
qwen-image, z-image, wan), a conversion is read the way ComfyUI's loader reads one (`comfy/ops.py`,
`_load_quantized_module`, commit 0271a469): every module's `comfy_quant` chooses the layout, whose parameters are the
module's other tensors. Printed: the largest difference of a layer's output to svdq's own runtime, and the images of
both against the 16-bit model's, comfy-kitchen's with bfloat16 activations and float32 arithmetic, as its CUDA kernels
compute, and with bfloat16 arithmetic. nvfp4's product has no version for CPUs: its two operands are dequantized and
multiplied. Exit code 1 where comfy-kitchen's image in float32 is more than a decibel worse than svdq's or a tensor is
left over.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from svdq_cli import load_pipeline
from svdq_cli.checkpoint.reader import Checkpoint, component_in, open_checkpoint
from svdq_cli.conversion.convert import convert
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

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

NAMES = ("demo", "flux", "sdxl", "qwen-image", "z-image", "wan")
MOST_APART = 1.0  # dB by which comfy-kitchen's image may be worse
STEPS = 4
PROMPT = "a pink rabbit"
OUTPUT = Output(format="comfy-core")
QUANTIZATION = {
    "int4": Quantization(effort="datafree"),
    "nvfp4": Quantization(
        precision="nvfp4", effort="fast"
    ),  # calibrated, for a smoothing factor that is not 1
}
CALIBRATION = Calibration(samples=2, steps=2, rows=256)


def kitchen_weights(file: Path, dtype: torch.dtype) -> tuple[dict[str, Any], set[str]]:
    """Every quantized module of a file as comfy-kitchen's tensor, and the keys of all other tensors. `dtype`: of the
    activations."""
    from comfy_kitchen import tensor as kitchen  # pyright: ignore[reportMissingImports]

    state = load_file(file)
    found: dict[str, Any] = {}
    for name in [key.removesuffix(".comfy_quant") for key in state if key.endswith(".comfy_quant")]:
        said = json.loads(state.pop(f"{name}.comfy_quant").numpy().tobytes())
        weight = state.pop(f"{name}.weight")
        rotation = int(said.get("convrot_groupsize", 256))
        match said["format"]:
            case "convrot_w4a4":
                layout = kitchen.TensorCoreConvRotW4A4Layout
                params = {"scale": state.pop(f"{name}.weight_scale"), "convrot_groupsize": rotation}
                params |= {"quant_group_size": 64, "linear_dtype": said.get("linear_dtype", "int4")}
            case "asym_w4a8_int8":
                layout = kitchen.AsymW4A8Int8Layout
                params = {
                    "scale": state.pop(f"{name}.weight_s_rel"),
                    "s_channel": state.pop(f"{name}.weight_s_channel"),
                    "codebook": state.pop(f"{name}.weight_codebook"),
                    "group_size": int(said.get("group_size", 16)),
                    "convrot_groupsize": rotation,
                }
            case "awq_w4a16":
                layout = kitchen.TensorCoreAWQW4A16Layout
                params = {
                    "scale": state.pop(f"{name}.weight_scale"),
                    "zeros": state.pop(f"{name}.weight_zeros"),
                    "group_size": int(said.get("group_size", 64)),
                }
            case "nvfp4":
                layout = kitchen.TensorCoreNVFP4Layout
                params = {
                    "scale": state.pop(f"{name}.weight_scale_2"),
                    "block_scale": state.pop(f"{name}.weight_scale"),
                }
            case other:
                raise SystemExit(f"{name}: ComfyUI has no quantization format {other!r}")
        shape = (weight.shape[0], 2 * weight.shape[1])
        own = torch.bfloat16 if said["format"] == "awq_w4a16" else dtype  # it computes in its scales' dtype
        made = layout.Params(**params, orig_dtype=own, orig_shape=shape)
        found[name] = kitchen.QuantizedTensor(weight, layout.__name__, made)
    return found, set(state)


def smoothing_factors(file: Path) -> dict[str, Tensor]:
    """By module, what ComfyUI multiplies inputs by before they are quantized; of nvfp4 modules only."""
    suffix = ".pre_quant_scale"
    return {key.removesuffix(suffix): t for key, t in load_file(file).items() if key.endswith(suffix)}


class KitchenLinear(nn.Module):
    """The rows of one of comfy-kitchen's modules that are one of diffusers' layers."""

    def __init__(self, weight: Any, rows: slice, bias: Tensor | None, smooth: Tensor | None) -> None:
        super().__init__()
        self.kitchen, self.rows, self.bias = [weight], rows, bias  # in a list: not a parameter to be moved
        self.smooth = smooth
        self.out_features, self.in_features = rows.stop - rows.start, weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        rows = x.to(torch.bfloat16)
        if self.smooth is not None:
            rows = self._quantized((rows * self.smooth).flatten(0, -2))
        rows = rows.to(self.kitchen[0].dtype)
        if self.smooth is not None:
            rows = rows.reshape(x.shape)
        y = F.linear(rows, self.kitchen[0])[..., self.rows]
        return (y if self.bias is None else y + self.bias).to(torch.bfloat16).to(x.dtype)

    def _quantized(self, rows: Tensor) -> Tensor:
        """What nvfp4's operator multiplies with, (M, K): ComfyUI gives no scale, so it is the tensor's own."""
        from comfy_kitchen import tensor as kitchen  # pyright: ignore[reportMissingImports]

        quantized = kitchen.QuantizedTensor.from_float(rows, "TensorCoreNVFP4Layout")
        return quantized.to(self.kitchen[0].dtype).dequantize()


def kitchen_layers(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, KitchenLinear]:
    """Every quantized layer of a checkpoint, run by comfy-kitchen. SystemExit where ComfyUI would find a tensor that is
    none of its."""
    weights, left = kitchen_weights(checkpoint.source.path, dtype)
    smooth = smoothing_factors(checkpoint.source.path)
    own = {f"{name}.bias" for name in weights} | {f"{name}.pre_quant_scale" for name in smooth}
    if foreign := left - own - set(checkpoint.kept_specs()) - set(checkpoint.marker_names()):
        raise SystemExit(f"{checkpoint.source.path}: left over: {', '.join(sorted(foreign))}")
    layers: dict[str, KitchenLinear] = {}
    for module in checkpoint.file.modules:
        start = 0
        for layer in module.layers:
            rows = slice(start, start + layer.linear.out_features)
            start = rows.stop
            layers[layer.name] = KitchenLinear(
                weights[module.name], rows, checkpoint.solution(layer).bias, smooth.get(module.name)
            )
    return layers


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


def compared(name: str, folder: Path, numbers: str) -> Result:
    """A conversion of a tiny model, run by both."""
    model = "demo" if name == "demo" else str(_pipeline(name, folder / "model"))
    wanted = QUANTIZATION[numbers]
    calibration = None if wanted.effort == "datafree" else CALIBRATION
    recipe = default_recipe(model, quantization=wanted, calibration=calibration, outputs=(OUTPUT,))
    prepared_source = source_of(recipe, DEFAULT_OPTIONS)
    file = folder / f"{numbers}.safetensors"
    convert(recipe, file, options=RunOptions(device="cpu"))
    base = prepared_source.pipeline
    assert base is not None
    checkpoint = open_checkpoint(file)
    settings = replace(usual_sampling(prepared_source).settings, steps=STEPS, batch_size=1)

    def drawn(pipe: DiffusionPipeline) -> Image:
        return generate_one(pipe, PROMPT, settings=settings, observe=ignore_events)[0]

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
        x = x.to(torch.bfloat16).float()
        own = quantized_linear(solution)(x).float()
        yield float((layers[plan.name](x).float() - own).norm() / own.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description="What comfy-kitchen makes of comfy-core files")
    parser.add_argument("--kitchen", type=Path, required=True, help="folder with comfy_kitchen in it")
    parser.add_argument("names", nargs="*", default=NAMES)
    said = parser.parse_args()
    sys.path.insert(0, str(said.kitchen.resolve()))
    titles = ("kitchen", "in bf16", "svdq", "between")
    print(f"{'model':12} {'':5} layers  layer differs " + " ".join(f"{title:>9}" for title in titles))
    sound = True
    for name in said.names:
        for numbers in QUANTIZATION:
            with tempfile.TemporaryDirectory() as folder:
                found = compared(name, Path(folder), numbers)
            values = (found.kitchen_db, found.bfloat16_db, found.own_db, found.between_db)
            print(
                f"{found.name:12} {numbers:5} {found.layers:6} {found.difference:14.2%} ",
                *(f"{value:6.2f} dB" for value in values),
                "" if found.sound else "apart",
                flush=True,
            )
            sound = sound and found.sound
    return 0 if sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
