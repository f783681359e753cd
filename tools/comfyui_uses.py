"""What users of ComfyUI do next with a converted file: LoRAs, merges, saving, other dtypes; in a checkout, on a CPU.

    python -m tools.comfyui_uses --checkout FOLDER --python PYTHON [--kitchen FOLDER]

A small FLUX pipeline with the head width that ComfyUI takes for granted is converted to comfy-core, calibrated, so that
smoothing factors are not 1 and codes are not the nearest. ComfyUI runs every file as it is, with a LoRA, merged half
and half with the 16-bit model, saved and loaded again, and with UNETLoader's other dtypes. Printed: the SQNR of its
output against what it makes of the 16-bit file by the same steps, and of a LoRA the share of its effect that is left.
Beside them, the file that `svdq convert --lora` makes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.conversion.convert import convert
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Calibration, Output, Quantization, default_recipe
from svdq_cli.recipe.schema import Lora
from svdq_cli.source import open_source
from tests.tiny import TEXT_WIDTH, tiny_flux_pipeline, tiny_vae
from tools.comfyui import Case, Stock, add_stock, sixteen_bit_file, sqnr_db, stock_of
from tools.comfyui_models import SIDE, TOKENS, Call

HEADS, WIDTH = 2, 128
CHANNELS = 16  # of latents: ComfyUI's class has no other number
RANK, STRENGTH = 8, 0.3  # the LoRA changes weights by that share of their size
CASES = (
    Case("int4", "comfy-core", modulation="keep"),
    Case("int4, W4A16", "comfy-core"),
    Case("nvfp4", "comfy-core", "nvfp4", "keep"),
    Case("nvfp4, smoothing none", "comfy-core", "nvfp4", "keep"),
)
DTYPES = ("float8_e4m3fn", "float8_e5m2")


def write_pipeline(folder: Path) -> None:
    """A FLUX pipeline of 256 channels."""
    pipe = FluxPipeline.from_pretrained(tiny_flux_pipeline(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=4 * CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=WIDTH,
            num_attention_heads=HEADS,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            axes_dims_rope=(16, 56, 56),
        )
        for module in transformer.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
                # a few strong channels, as real models have them, for smoothing to matter
                module.weight.data[:, :: module.in_features // 4] *= 4
        config = {**tiny_vae().config, "latent_channels": CHANNELS}
        vae = AutoencoderKL.from_config(config)
    pipe.register_modules(transformer=transformer, vae=vae)
    pipe.to(dtype=torch.bfloat16)
    pipe.save_pretrained(folder)


def call() -> Call:
    """Of ComfyUI's model of that pipeline."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Call(
        normal(1, CHANNELS, SIDE, SIDE), normal(1, TOKENS, TEXT_WIDTH), others={"y": normal(1, TEXT_WIDTH)}
    )


def write_lora(original: Path, file: Path, *, modulations: bool) -> None:
    """A LoRA of every matrix of the blocks, in the names that ComfyUI takes from any trainer: those of its model."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    with safe_open(original, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118 # a file, not a dict
            if not key.endswith(".weight") or not key.startswith(("double_blocks", "single_blocks")):
                continue
            weight = opened.get_tensor(key).float()
            if weight.dim() != 2 or (("_mod." in key or "modulation" in key) and not modulations):
                continue
            up = torch.randn(len(weight), RANK, generator=generator)
            down = torch.randn(RANK, weight.shape[1], generator=generator)
            up *= STRENGTH * weight.norm() / (up @ down).norm()
            name = key.removesuffix(".weight")
            tensors[f"diffusion_model.{name}.lora_B.weight"] = up
            tensors[f"diffusion_model.{name}.lora_A.weight"] = down
    save_file(tensors, file)


def convert_case(folder: Path, case: Case, file: Path, *, lora: Path | None = None) -> None:
    given = {"precision": case.precision, "effort": "fast"}
    if "smoothing none" in case.title:
        given["smoothing"] = "none"
    quantization = Quantization.model_validate(given)
    recipe = default_recipe(
        str(folder / "model"),
        quantization=quantization,
        calibration=Calibration(samples=4, steps=4, rows=512, height=64, width=64),
        outputs=(Output(format=case.format),),
    )
    changes: dict[str, object] = {"modulation": case.modulation}
    if lora is not None:
        changes["model"] = recipe.model.model_copy(update={"loras": (Lora(path=str(lora)),)})
    convert(recipe.model_copy(update=changes), file, options=RunOptions(device="cpu"))


def steps_of(folder: Path, title: str, other: Path) -> list[dict[str, str]]:
    """All that is tried on one file. `other`: the 16-bit file of a second model, for merging."""
    file = str(folder / f"{title}.safetensors")
    saved = str(folder / f"{title} saved.safetensors")
    named: dict[str, dict[str, str]] = {
        "": {"save": saved},
        "LoRA": {"lora": str(folder / "lora.safetensors")},
        "LoRA of modulations": {"lora": str(folder / "modulations.safetensors")},
        "LoRA of modulations, bypass": {"lora": str(folder / "modulations.safetensors"), "bypass": "yes"},
        "merge": {"merge": str(other)},
        **{f"weight_dtype {dtype}": {"dtype": dtype} for dtype in DTYPES},
    }
    steps = [
        {"name": f"{title}|{name}", "file": file, "out": str(folder / f"{title}|{name}.out"), **step}
        for name, step in named.items()
    ]
    again = {"name": f"{title}|saved", "file": saved, "out": str(folder / f"{title}|saved.out")}
    return [steps[0], again, *steps[1:]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.comfyui_uses", description=__doc__)
    add_stock(parser)
    stock: Stock = stock_of(parser.parse_args())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_pipeline(folder / "model")
        original, other = folder / "16 bits.safetensors", folder / "other.safetensors"
        sixteen_bit_file(open_source(folder / "model"), original)
        write_lora(original, folder / "lora.safetensors", modulations=False)
        write_lora(original, folder / "modulations.safetensors", modulations=True)
        sixteen_bit_file(open_source(folder / "model"), other)
        steps = steps_of(folder, "16 bits", other)
        for case in CASES:
            convert_case(folder, case, folder / f"{case.title}.safetensors")
            steps += steps_of(folder, case.title, other)
            merged = f"{case.title}, --lora"
            lora = folder / "lora.safetensors"
            convert_case(folder, case, folder / f"{merged}.safetensors", lora=lora)
            file = str(folder / f"{merged}.safetensors")
            steps.append({"name": f"{merged}|", "file": file, "out": str(folder / f"{merged}|.out")})
        found = stock.run(folder, call(), steps)
        print(f"ComfyUI {found['version']}, comfy-kitchen {found['kitchen']}")
        _print(folder, found["steps"])
    return 0


def _print(folder: Path, steps: dict[str, dict[str, object]]) -> None:
    def output(title: str, name: str) -> Tensor:
        return load_file(folder / f"{title}|{name}.out")["denoised"]

    for full, step in steps.items():
        title, _, name = full.partition("|")
        if not step["loads"]:
            print(f"{title} {name}: {step['said']}")
            continue
        wanted = "LoRA" if "--lora" in title else "" if name == "saved" else name
        exact = output("16 bits", wanted)
        line = f"{title} {name}: {sqnr_db(output(title, name), exact):.1f} dB"
        if wanted.startswith("LoRA") and title != "16 bits":
            plain = title.removesuffix(", --lora")
            effect = exact - output("16 bits", "")
            found = output(title, name) - output(plain, "")
            line += f", {float((found * effect).sum() / effect.square().sum()):.2f} of the LoRA's effect"
        print(line, f"{step['layouts']}" if name == "" else "", *step["log"])  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
