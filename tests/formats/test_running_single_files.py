"""A single file draws with the other components of a base pipeline, computed as its own runtime computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.entrypoints.inspect import inspect_checkpoint
from svdq_cli.errors import InputError
from svdq_cli.inference.backend import choose_backend
from svdq_cli.inference.load import load_model, load_pipeline
from svdq_cli.records import W4A4Solution
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear
from svdq_cli.runtime.linear import W4A4Linear, w4a4_exact


def test_a_single_file_needs_a_base_and_says_so(converted_flux: Callable[[str], Path], tiny_flux: Path):
    path = converted_flux("int4") / "nunchaku.safetensors"
    with pytest.raises(InputError, match="only one component, not a pipeline") as caught:
        load_pipeline(path, device="cpu")
    assert "--base" in str(caught.value.hint)
    pipe = load_pipeline(path, device="cpu", base=tiny_flux)
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, CpuW4A4Linear | W4A4Linear)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["nunchaku", "comfy"])
def test_generate_and_eval_run_on_a_single_file(
    converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path, name: str
):
    path = converted_flux("int4") / f"{name}.safetensors"
    size = "--width 32 --height 32 --steps 1 --device cpu -q"
    words = f"generate {path} --prompt circle -o {tmp_path}/one.png --base {tiny_flux} {size}"
    assert run(words.split()) == 0
    assert (tmp_path / "one.png").is_file()
    assert run(f"eval {path} --against {tiny_flux} --samples 1 {size} --json".split()) == 0


def test_only_runtimes_that_fuse_the_gelu_quantize_without_a_sign(converted_flux: Callable[[str], Path]):
    folder = converted_flux("int4")
    second = "single_transformer_blocks.0.proj_out"
    expected = {"lite": (None, None), "nunchaku.safetensors": (0, 128), "comfy.safetensors": (0, None)}
    for name, columns in expected.items():
        checkpoint = open_checkpoint(folder / name)
        layers = {layer.name: layer for layer in checkpoint.layers}
        found = tuple(checkpoint.unsigned_from(layers[n]) for n in ("transformer_blocks.0.ff.net.2", second))
        assert found == columns, name
    checkpoint = open_checkpoint(folder / "nunchaku.safetensors")
    backend = choose_backend("reference", torch.device("cpu"), checkpoint.dtype)
    model, _ = load_model(checkpoint, dtype=torch.float32, backend=backend)
    assert model.get_submodule(second).unsigned_from == 128


def test_unsigned_activations_halve_the_step_after_a_gelu(converted_flux: Callable[[str], Path]):
    """The reason for the shift: a GELU's output is hardly ever negative, so a sign bit is wasted on it."""
    checkpoint = open_checkpoint(converted_flux("int4") / "nunchaku.safetensors")
    layer = next(plan for plan in checkpoint.layers if plan.name == "transformer_blocks.0.ff.net.2")
    solution = checkpoint.solution(layer)
    assert isinstance(solution, W4A4Solution)
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.gelu(2 * torch.randn(256, 512, generator=generator), approximate="tanh")
    weight = (solution.codes.float().unflatten(1, (-1, 64)) * solution.scales.float().unsqueeze(-1)).flatten(
        1
    )
    weight = weight / solution.smooth.float() + solution.up.float() @ solution.down.float()
    bias = solution.bias
    assert bias is not None
    exact = x.bfloat16().float() @ weight.T + bias.float()

    def error(unsigned_from: int | None) -> float:
        return float((w4a4_exact(x, solution, unsigned_from=unsigned_from) - exact).norm() / exact.norm())

    assert error(0) < 0.7 * error(None)


@pytest.mark.parametrize("name", ["nunchaku", "comfy"])
def test_inspect_tells_what_a_single_file_holds(converted_flux: Callable[[str], Path], name: str):
    report = inspect_checkpoint(converted_flux("int4") / f"{name}.safetensors")
    assert (report.kind, report.format, report.family, report.precision, report.rank) == (
        "checkpoint",
        name,
        "flux",
        "int4",
        16 if name == "nunchaku" else report.rank,
    )
    roles = {layer.name: layer.role for layer in report.layers}
    assert roles["transformer_blocks.0.attn.to_k"] == "w4a4"
    assert roles["transformer_blocks.0.norm1.linear"] == "w4a16"
    assert report.provenance is not None
