"""Files for ComfyUI in a checkout of ComfyUI: loaded by its own loader, and run once, on a CPU.

    python -m tools.comfyui --checkout FOLDER --python PYTHON [NAME ...]

PYTHON is an interpreter with what the checkout's requirements.txt asks for; neither needs a GPU, nor, for this, a
torchvision that works. For each family (NAME: flux, flux2, sdxl, qwen-image, z-image, wan) a small model of
`tools.comfyui_models` is stored at 16 bits under its original names, and converted to comfy-core in int4, with
modulations in 4 bits and at 16, in nvfp4, and to comfy. ComfyUI loads each; what it logs of missing and unexpected
tensors, the layouts that it chose, and the error of its output, as SQNR in dB, are printed: against its own output of
the 16-bit file, with svdq's own error for the same numbers beside it, against diffusers' output. Of the 16-bit file it
is ComfyUI's output against diffusers'.

Exit code 1 where ComfyUI is more than a decibel worse than svdq, a tensor is missing or left over, or a file does not
load for another reason than that this ComfyUI does not know its format.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdq_cli.checkpoint.assembly import kept_tensor
from svdq_cli.checkpoint.original_layout import lay_out_original, original_layout_of
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.families.layouts import LAYOUTS
from svdq_cli.formats import format_named
from svdq_cli.inference.backend import Backend
from svdq_cli.inference.load import load_model
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Quantization, default_recipe
from svdq_cli.records import W4A4Solution
from svdq_cli.runtime.linear import w4a4_weight
from svdq_cli.runtime.replace import replace_linears
from svdq_cli.source import Source, open_source
from tools.comfyui_models import MODELS, Call, Model
from tools.random_model import write_random_model

HOME = Path(__file__).parents[1]
SCRIPT = HOME / "tools/runtime_loaders/load_in_comfyui.py"
MOST_APART = 1.0  # dB by which ComfyUI may be worse
REFERENCE = Backend("reference", "whatever the machine")


@dataclass(frozen=True, slots=True)
class Case:
    """What a model is converted to."""

    title: str
    format: str
    precision: str = "int4"
    modulation: str = "auto"

    def needs(self) -> str:
        """A format that ComfyUI knows by name, without which it can't load the file."""
        if self.format == "comfy":
            return "svdquant_w4a4"
        return "convrot_w4a4" if self.precision == "int4" else "nvfp4"


CASES = (
    Case("int4", "comfy-core"),
    Case("int4, keep", "comfy-core", modulation="keep"),
    Case("nvfp4", "comfy-core", "nvfp4", "keep"),
    Case("comfy", "comfy"),
)


@dataclass(frozen=True, slots=True)
class Stock:
    """A checkout of ComfyUI, and the interpreter that runs it."""

    checkout: Path
    python: Path
    extra: tuple[Path, ...] = ()  # folders with packages that come before the interpreter's

    def run(
        self, folder: Path, call: Call, steps: Sequence[Mapping[str, str]], *options: str
    ) -> dict[str, Any]:
        """What becomes of the steps that `runtime_loaders/load_in_comfyui.py` is given."""
        save_file(
            {name: each.contiguous() for name, each in call.tensors().items()}, folder / "in.safetensors"
        )
        job = {"inputs": str(folder / "in.safetensors"), "numbers": dict(call.numbers), "steps": list(steps)}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        path = os.pathsep.join([str(self.checkout), *map(str, self.extra)])
        done = subprocess.run(
            [self.python, SCRIPT, folder / "job.json", *options],
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{SCRIPT} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def sixteen_bit_file(source: Source, file: Path) -> None:
    """The model as ComfyUI has it: one file, its tensors under their original names."""
    layout = original_layout_of(str(source.config["_class_name"]), "comfy-core")
    state = {name: entry.shape for name, entry in source.tensors.items()}
    kept = lay_out_original(format_named("comfy-core"), layout, (), state).kept
    tensors = {
        name: kept_tensor(each, [source.tensors[part].read() for part in each.sources]).contiguous()
        for name, each in kept.items()
    }
    save_file(tensors, file)


def converted(folder: Path, case: Case) -> Path:
    """The model of a folder as the case's file, without calibration."""
    file = folder / f"{case.title}.safetensors"
    quantization = Quantization.model_validate({"precision": case.precision, "effort": "datafree"})
    recipe = default_recipe(
        str(folder / "model"), quantization=quantization, outputs=(Output(format=case.format),)
    )
    recipe = recipe.model_copy(update={"modulation": case.modulation})
    convert(recipe, file, options=RunOptions(device="cpu"))
    return file


def sixteen_bit_model(source: Source) -> nn.Module:
    """diffusers' model, in float32."""
    import diffusers
    from accelerate import init_empty_weights

    model_class: Any = getattr(diffusers, str(source.config["_class_name"]))
    with init_empty_weights(include_buffers=False):
        model: nn.Module = model_class.from_config(dict(source.config))
    weights = {name: entry.read().float() for name, entry in source.tensors.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def svdq_model(file: Path, *, activations: bool = True) -> nn.Module:
    """The checkpoint in svdq's reference runtime, in float32; smoothed layers without their 4-bit activations where
    ComfyUI leaves those at 16 bits, as on any device but Blackwell."""
    checkpoint = open_checkpoint(file)
    model, _ = load_model(checkpoint, dtype=torch.float32, backend=REFERENCE)
    if not activations:
        exact: dict[str, nn.Module] = {}
        for plan in checkpoint.layers:
            solution = checkpoint.solution(plan)
            if isinstance(solution, W4A4Solution):
                exact[plan.name] = _dequantized(solution)
        replace_linears(model, exact)
    return model


def _dequantized(solution: W4A4Solution) -> nn.Linear:
    rows, columns = solution.codes.shape
    outer = 1.0 if solution.outer is None else solution.outer.float()
    linear = nn.Linear(columns, rows, bias=solution.bias is not None, device="meta")
    weight = w4a4_weight(solution) * outer / solution.smooth.float()
    tensors = {"weight": weight}
    if solution.bias is not None:
        tensors["bias"] = solution.bias.float()
    linear.load_state_dict(tensors, assign=True)
    return linear.requires_grad_(False)


def sqnr_db(found: Tensor, exact: Tensor) -> float:
    return float(20 * torch.log10(exact.norm() / (found - exact).norm()))


@torch.no_grad()
def _outputs(model: Model, call: Call, source: Source, files: Mapping[str, Path]) -> dict[str, Tensor]:
    """The denoised latents by diffusers, and by svdq of every file."""
    network = sixteen_bit_model(source)
    found = {"16 bits": model.denoised(network, call)}
    del network
    for title, file in files.items():
        gc.collect()
        found[title] = model.denoised(svdq_model(file), call)
        if title == "nvfp4":
            found["nvfp4, weights alone"] = model.denoised(svdq_model(file, activations=False), call)
    return found


def compared(name: str, stock: Stock, folder: Path) -> bool:
    """One family; True where everything is as it should be."""
    model, call = MODELS[name], MODELS[name].call()
    write_random_model(folder / "model", model.config)
    source = open_source(folder / "model")
    sixteen_bit_file(source, folder / "16 bits.safetensors")
    cases = [case for case in CASES if case.format == "comfy-core" or _has_layout(name, case.format)]
    files = {case.title: converted(folder, case) for case in cases}
    own = _outputs(model, call, source, files)
    gc.collect()
    steps = [
        {"name": title, "file": str(folder / f"{title}.safetensors"), "out": str(folder / f"{title}.out")}
        for title in ("16 bits", *files)
    ]
    found = stock.run(folder, call, steps)
    print(f"{name}: ComfyUI {found['version']}, comfy-kitchen {found['kitchen']}", flush=True)
    exact = load_file(folder / "16 bits.out")["denoised"]
    print(
        f"  16 bits: {_what(found['steps']['16 bits'])}, {sqnr_db(exact, own['16 bits']):.1f} dB from diffusers'"
    )
    sound = not found["steps"]["16 bits"]["log"]
    for case in cases:
        step = found["steps"][case.title]
        if not step["loads"]:
            known = case.needs() in found["formats"]
            awq = "awq_w4a16" in step["said"] and "awq_w4a16" not in found["formats"]
            sound = sound and (not known or awq)
            print(f"  {case.title}: does not load: {step['said']}")
            continue
        theirs = sqnr_db(load_file(folder / f"{case.title}.out")["denoised"], exact)
        ours = sqnr_db(own[case.title], own["16 bits"])
        line = f"  {case.title}: {_what(step)}, ComfyUI {theirs:.1f} dB, svdq {ours:.1f} dB"
        if case.title == "nvfp4":
            ours = sqnr_db(own["nvfp4, weights alone"], own["16 bits"])
            line += f", svdq without 4-bit activations {ours:.1f} dB"
        apart = ours - theirs > MOST_APART
        sound = sound and not apart and not step["log"]
        print(line + (" <- APART" if apart else ""), flush=True)
    return sound


def _has_layout(family: str, fmt: str) -> bool:
    return any((each.family, each.format) == (family, fmt) for each in LAYOUTS)


def _what(step: Mapping[str, Any]) -> str:
    """What was loaded, and whatever ComfyUI logged of it."""
    layouts = ", ".join(f"{count} {layout}" for layout, count in sorted(step["layouts"].items()))
    return "; ".join([f"{step['model']}, computes in {step['computes']}: {layouts}", *step["log"]])


def add_stock(parser: argparse.ArgumentParser) -> None:
    """The options that name a ComfyUI."""
    parser.add_argument("--checkout", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--python", type=Path, required=True, help="an interpreter with its requirements")
    parser.add_argument(
        "--kitchen", type=Path, help="folder with another comfy-kitchen than the interpreter's"
    )


def stock_of(said: argparse.Namespace) -> Stock:
    """What those options say."""
    extra = () if said.kitchen is None else (said.kitchen.resolve(),)
    return Stock(said.checkout.resolve(), said.python.absolute(), extra)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.comfyui", description=__doc__)
    add_stock(parser)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    said = parser.parse_args()
    stock = stock_of(said)
    sound = True
    for name in said.names:
        with tempfile.TemporaryDirectory() as folder:
            sound = compared(name, stock, Path(folder)) and sound
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
