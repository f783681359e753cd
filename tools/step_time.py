"""One step of diffusers' own FLUX.1 class on a CPU: the 16-bit model, and the same model converted.

    python -m tools.step_time [--folder DIR] [--double 1] [--single 1]

Writes a transformer of FLUX.1-dev's width with random weights, converts it without calibration, and times a step of
1024 x 1024 pixels (4096 + 512 tokens) in a process for each row: the better of three. Also prints how much of another
step is attention and how much the linear layers, by torch's profiler. Takes 2 GB of disk and some minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tools.generate_flux import generate_flux

ROWS = (("source", "float32"), ("source", "bfloat16"), ("converted", "float32"), ("converted", "bfloat16"))
SIDE, TEXT = 64, 512  # tokens
ATTENTION = ("aten::_scaled_dot_product_flash_attention_for_cpu", "svdq::cpu_attention")
ENGINE = ("cpu_quantize_down", "cpu_w4a4_gemm", "cpu_w4a4_gelu_quantize", "cpu_w4a16_linear")
LINEARS = ("aten::addmm", "aten::mm", *(f"svdq::{name}" for name in ENGINE))


def step_seconds(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """The better of three steps, and of another one the seconds in attention and in linear layers."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(SIDE * SIDE)
    given: dict[str, Any] = {
        "hidden_states": torch.randn(1, SIDE * SIDE, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, 4096, generator=generator),
        "pooled_projections": torch.randn(1, 768, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.stack([0 * rows, rows // SIDE, rows % SIDE], 1).float(),
    }
    given = {name: value.to(dtype) for name, value in given.items()}
    taken: list[float] = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            model(**given, return_dict=False)
            taken.append(time.perf_counter() - started)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            model(**given, return_dict=False)
    own = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
    parts = {"attention": ATTENTION, "linears": LINEARS}
    return {
        "step": min(taken),
        **{part: sum(own.get(name, 0) for name in names) for part, names in parts.items()},
    }


def loaded(folder: Path, what: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model in `folder`/source or `folder`/converted, as svdq runs it."""
    if what == "source":
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        return FluxTransformer2DModel.from_pretrained(folder / what, torch_dtype=dtype).eval()
    from svdq_cli.checkpoint.reader import open_checkpoint
    from svdq_cli.inference.backend import choose_backend
    from svdq_cli.inference.load import load_model

    checkpoint = open_checkpoint(folder / what)
    backend = choose_backend("auto", torch.device("cpu"), checkpoint.dtype)
    return load_model(checkpoint, dtype=dtype, backend=backend)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=1)
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "DTYPE"), help="time this one, in this process")
    given = parser.parse_args()
    if given.row:
        what, name = given.row
        dtype = getattr(torch, name)
        print(json.dumps(step_seconds(loaded(given.folder, what, dtype), dtype)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder: Path = given.folder or Path(scratch)
        if not (folder / "source").exists():
            generate_flux(folder / "source", double=given.double, single=given.single)
        if not (folder / "converted").exists():
            convert = ("convert", folder / "source", "--effort", "datafree", "--rank", "32", "-q")
            subprocess.run(
                [sys.executable, "-m", "svdq_cli", *convert, "-o", folder / "converted"], check=True
            )
        print("| model | step | attention | linear layers |\n|---|---:|---:|---:|")
        for row in ROWS:
            command = [sys.executable, "-m", "tools.step_time", "--folder", folder, "--row", *row]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            shown = " | ".join(f"{found[part]:.2f} s" for part in ("step", "attention", "linears"))
            print(f"| {row[0]}, {row[1]} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
