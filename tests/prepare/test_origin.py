"""`svdq check` and `svdq eval` first ask whether the 16-bit model is the one that the checkpoint was made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.lora.fold import fold
from svdq_cli.prepare.options import DEFAULT_OPTIONS
from svdq_cli.prepare.origin import held_already, origin_of
from svdq_cli.recipe import default_recipe
from svdq_cli.source import open_source, source_digest
from tests.adapters.test_loras import peft
from tests.lora.layers import FOUR_BIT, small_lora

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def lite(converted_flux: Callable[[str], Path]) -> Path:
    return converted_flux("int4") / "lite"


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA five times as strong as the others of the tests: with it, a weight's relative error is another."""
    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    adapter = {name: (down, 5 * up) for name, (down, up) in small_lora(FOUR_BIT).items()}
    save_file({name: tensor.contiguous() for name, tensor in peft(adapter).items()}, path)
    return path


@pytest.fixture(scope="module")
def folded(lite: Path, style: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folded") / "lite-style"
    fold(lite, [LoraFile(style, 0.8)], out)
    return out


def test_a_lora_that_the_checkpoint_holds_already_is_said_to_count_twice(
    lite: Path, folded: Path, style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = "style.safetensors is already in the checkpoint, at 0.8; with this one its strength is 1.3"
    same = tmp_path / "of_another_name.safetensors"
    same.write_bytes(style.read_bytes())
    assert fold(folded, [LoraFile(same, 0.5)], tmp_path / "twice").warnings[0] == said
    assert held_already(open_checkpoint(lite), [LoraFile(style, 0.5)]) == ()
    words = ["--lora", f"{style}:0.5", "--prompt", "a", "--steps", "2", "-o", str(tmp_path / "a.png")]
    assert run(["generate", str(folded), *words]) == 0
    assert said in " ".join(capsys.readouterr().err.split())


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Mapping[str, object], str]:
    capsys.readouterr()
    code = run(["check", *map(str, arguments), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_the_model_that_it_was_made_from_is_known_by_its_digest(
    lite: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]
):
    code, report, _ = check(capsys, lite, "--against", tiny_flux)
    assert (code, report["status"], report["same_source"], report["warnings"]) == (0, "ok", True, [])


def test_another_model_is_named_as_another_model_and_the_checkpoint_is_not_blamed(
    lite: Path, tiny_flux_copy: Path, capsys: pytest.CaptureFixture[str]
):
    file = tiny_flux_copy / WEIGHTS
    save_file({name: 1.02 * t if t.ndim == 2 else t for name, t in load_file(file).items()}, file)
    code, report, stderr = check(capsys, lite, "--against", tiny_flux_copy)
    error = report["error"]
    assert isinstance(error, dict)
    assert (code, error["kind"]) == (3, "wrong-source")
    assert "is not the 16-bit model that the checkpoint was made from" in error["message"]
    assert "do not use" not in stderr


def test_the_same_weights_in_another_dtype_pass_with_a_note(
    lite: Path, tiny_flux_copy: Path, capsys: pytest.CaptureFixture[str]
):
    file = tiny_flux_copy / WEIGHTS
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file)
    code, report, _ = check(capsys, lite, "--against", tiny_flux_copy)
    assert (code, report["status"], report["same_source"]) == (0, "ok", False)
    (note,) = report["warnings"]  # type: ignore[misc]
    assert "up to rounding, the weights that the checkpoint was made from" in note


def test_a_folded_lora_is_read_from_the_checkpoint_s_own_report(
    folded: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]
):
    code, report, _ = check(capsys, folded, "--against", tiny_flux)
    assert (code, report["status"], report["same_source"]) == (0, "ok", True)
    assert report["loras"] == ["style.safetensors:0.8"]


def test_a_folded_lora_that_is_nowhere_is_asked_for_by_its_option(
    lite: Path, style: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    moved = tmp_path / "elsewhere" / "style.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(style.read_bytes())
    out = tmp_path / "out" / "lite-style"
    fold(lite, [LoraFile(moved, 0.8)], out)
    moved.rename(tmp_path / "elsewhere" / "renamed.safetensors")
    code, report, stderr = check(capsys, out, "--against", tiny_flux)
    assert (code, report["error"]["kind"]) == (3, "wrong-source")  # type: ignore[index]
    assert "add --lora style.safetensors:0.8" in stderr
    assert "do not use" not in stderr
    # under whatever name, the file is known by its content
    given = f"{tmp_path / 'elsewhere' / 'renamed.safetensors'}:0.8"
    code, report, _ = check(capsys, out, "--against", tiny_flux, "--lora", given)
    assert (code, report["same_source"], report["loras"]) == (0, True, [])


def test_a_folded_lora_with_another_weight_is_told_its_weight(
    folded: Path, style: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]
):
    code, _, stderr = check(capsys, folded, "--against", tiny_flux, "--lora", style)
    assert code == 3
    assert "give it as --lora style.safetensors:0.8" in stderr


def test_a_lora_that_the_checkpoint_does_not_hold_is_named(
    lite: Path, style: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]
):
    code, _, stderr = check(capsys, lite, "--against", tiny_flux, "--lora", style)
    assert code == 3
    assert "the checkpoint holds no LoRA style.safetensors" in stderr


def test_a_lora_that_was_merged_before_the_conversion_is_found_too(
    tiny_flux: Path, style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "merged"
    converted = ["convert", str(tiny_flux), "--lora", f"{style}:0.5", "--effort", "datafree", "-q"]
    assert run([*converted, "-o", str(out), "--rank", "16", "--device", "cpu"]) == 0
    code, report, _ = check(capsys, out, "--against", tiny_flux)
    assert (code, report["same_source"], report["loras"]) == (0, True, ["style.safetensors:0.5"])


def test_a_merged_model_is_the_same_whatever_torchs_default_dtype_is_meanwhile(tiny_flux: Path, style: Path):
    """transformers sets it while it loads a model, for all threads; the digest is computed in another one."""
    merged = merge_loras(open_source(tiny_flux), [LoraFile(style, 0.5)])
    digest = source_digest(merged)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert source_digest(merge_loras(open_source(tiny_flux), [LoraFile(style, 0.5)])) == digest
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_damaged_checkpoint_next_to_its_own_model_is_still_a_failed_check(
    lite: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damaged = tmp_path / "damaged"
    for file in (path for path in lite.rglob("*") if path.is_file()):
        target = damaged / file.relative_to(lite)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    file = damaged / WEIGHTS
    content = bytearray(file.read_bytes())
    name = "single_transformer_blocks.0.attn.to_q"
    size = int.from_bytes(content[:8], "little")
    first, last = json.loads(content[8 : 8 + size])[f"{name}.qweight"]["data_offsets"]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (last - first,), dtype=torch.uint8, generator=generator)
    content[8 + size + first : 8 + size + last] = noise.numpy().tobytes()
    file.write_bytes(content)
    code, report, stderr = check(capsys, damaged, "--against", tiny_flux)
    assert (code, report["status"], report["same_source"]) == (7, "failed", True)
    assert "do not use this checkpoint" in stderr


def test_an_evaluation_has_the_objection_and_goes_on(
    lite: Path, folded: Path, tmp_path: Path, tiny_flux: Path
):
    """`svdq eval` compares what it is given, and says that it is another model."""
    other = tmp_path / "other"
    for file in (path for path in tiny_flux.rglob("*") if path.is_file()):
        (other / file.relative_to(tiny_flux)).parent.mkdir(parents=True, exist_ok=True)
        (other / file.relative_to(tiny_flux)).write_bytes(file.read_bytes())
    file = other / WEIGHTS
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)
    origin = origin_of(open_checkpoint(lite), default_recipe(str(other)), DEFAULT_OPTIONS)
    (note,) = origin.notes
    assert "is not the 16-bit model that the checkpoint was made from" in note
    found = origin_of(open_checkpoint(folded), default_recipe(str(tiny_flux)), DEFAULT_OPTIONS)
    assert (found.same, found.loras) == (True, ("style.safetensors:0.8",))
