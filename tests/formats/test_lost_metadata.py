"""A converted file that some tool saved again, without its metadata: it says what it lacks, and a base has that."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.conversion.convert import convert
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Quantization, default_recipe
from svdq_cli.records import LayerSolution
from svdq_cli.storage.headers import header_metadata
from tests.tiny_families import tiny_pipeline


def without_metadata(path: Path, folder: Path, *, only: str | None = None) -> Path:
    """As other tools save it: the tensors, and no metadata (or all of it but `only`)."""
    bare = folder / path.name
    metadata = header_metadata(path) if only else {}
    metadata.pop(only or "", None)
    save_file(load_file(path), bare, metadata or None)
    return bare


def tensors_of(solution: LayerSolution) -> dict[str, Tensor]:
    fields = {field.name: getattr(solution, field.name) for field in dataclasses.fields(solution)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def assert_same_checkpoint(bare: Path, whole: Path, base: Path) -> None:
    expected, found = open_checkpoint(whole), open_checkpoint(bare, base=base)
    for fact in ("format", "layers", "precision", "rank", "dtype", "kept", "family", "model_class"):
        assert getattr(found, fact) == getattr(expected, fact), fact
    for plan in expected.layers:
        theirs = tensors_of(found.solution(plan))
        for name, tensor in tensors_of(expected.solution(plan)).items():
            # A bias that is stored moved has lost 8 bits of mantissa of what it was moved by
            close = torch.allclose(theirs[name].float(), tensor.float(), atol=2**-8)
            assert close if name == "bias" else torch.equal(theirs[name], tensor), (plan.name, name)


@pytest.mark.parametrize("only", [None, "config"], ids=["all of it", "the config"])
@pytest.mark.parametrize("name", ["nunchaku", "comfy"])
def test_with_its_base_it_is_the_same_checkpoint(
    converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path, name: str, only: str | None
):
    whole = converted_flux("int4") / f"{name}.safetensors"
    assert_same_checkpoint(without_metadata(whole, tmp_path, only=only), whole, tiny_flux)


def test_nvfp4_is_told_by_its_tensors(converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path):
    whole = converted_flux("nvfp4") / "nunchaku.safetensors"
    assert_same_checkpoint(without_metadata(whole, tmp_path), whole, tiny_flux)


def test_vllm_omni_is_told_from_nunchaku(tmp_path: Path):
    base = tiny_pipeline("z-image", tmp_path / "base")
    whole = tmp_path / "whole.safetensors"
    quantization = {"precision": "nvfp4", "rank": 16, "effort": "datafree"}
    recipe = default_recipe(
        str(base),
        quantization=Quantization.model_validate(quantization),
        outputs=[Output.model_validate({"format": "vllm-omni", "path": str(whole)})],
    )
    convert(recipe, whole, options=RunOptions(device="cpu"))
    (tmp_path / "bare").mkdir()
    assert_same_checkpoint(without_metadata(whole, tmp_path / "bare"), whole, base)


def test_without_a_base_it_says_what_is_missing_and_nothing_goes_in_a_circle(
    converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bare = without_metadata(converted_flux("int4") / "nunchaku.safetensors", tmp_path)
    out = f"--prompt x -o {tmp_path}/x.png --steps 1 --width 32 --height 32 --device cpu -q"
    for words in (f"inspect {bare}", f"check {bare}", f"generate {bare} {out}"):
        capsys.readouterr()
        assert run([*words.split(), "--json"]) == 3
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["kind"] == "needs-base"
        assert "no 'config'" in error["message"]
        assert "--base" in error["hint"]
        assert run(f"{words} --base {tiny_flux}".split()) == 0
    for words in (
        f"export {bare} --to nunchaku-lite --base {tiny_flux} -o {tmp_path}/o",
        f"lora {bare} --lora x.safetensors -o {tmp_path}/o",
    ):
        capsys.readouterr()
        assert run([*words.split(), "--json"]) == 3
        hint = json.loads(capsys.readouterr().out)["error"]["hint"]
        assert "use the file as svdq convert wrote it" in hint
        assert "FOLDER_OR_HUB_ID" not in hint
    lone = tiny_flux / "transformer"
    assert run(["eval", str(bare), "--against", str(lone), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["hint"].startswith("give --against a whole pipeline")
    assert run(f"check {bare} --against {tiny_flux} -q".split()) == 0
    assert run(f"eval {bare} --against {tiny_flux} --samples 1 {out[out.index('--steps') :]}".split()) == 0
