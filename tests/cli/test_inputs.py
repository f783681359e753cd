"""Every kind of input on the command line: what converts, and with which exit code and cure the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.cli import run
from svdq_cli.source.original_names import FLUX1
from tests.adapters.test_loras import kohya_bfl, trained
from tests.source.originals import original_state

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DATA_FREE = "--effort datafree --rank 16 -q --json"


@pytest.fixture(scope="module")
def bfl_state(tiny_flux: Path) -> dict[str, Tensor]:
    return original_state(FLUX1, load_file(tiny_flux / WEIGHTS))


@pytest.fixture(scope="module")
def bfl(bfl_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("single") / "my-finetune.safetensors"
    save_file(bfl_state, file)
    return file


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(kohya_bfl(trained()), file)
    return file


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one: `-o out` is nowhere yet, whatever lies where the tests were started."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], words: str, code: int) -> dict[str, str]:
    capsys.readouterr()
    assert run([*words.split(), "--json"]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    error = json.loads(captured.out)["error"]
    assert error["code"] == code
    assert error["hint"]
    return error


def test_a_single_file_with_a_lora_is_inspected_converted_checked_and_judged(
    bfl: Path, lora: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = f"--base {tiny_flux} --lora {lora}:0.1"
    assert run(f"inspect {bfl} {model} --json".split()) == 0
    inspected = said(capsys)
    assert (inspected["family"], inspected["read_as"]) == (
        "flux",
        "single file, original (BFL) names, 1 LoRA merged",
    )
    out = tmp_path / "out"
    assert run(f"convert {bfl} {model} -o {out} {DATA_FREE}".split()) == 0
    report = said(capsys)
    assert report["read_as"] == inspected["read_as"]
    assert report["recipe"]["model"]["loras"] == [{"path": str(lora), "weight": 0.1}]
    assert run(f"check {out} --against {bfl} {model} -q --json".split()) == 0
    assert said(capsys)["status"] == "ok"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    drawing = f"--prompts {prompts} --samples 1 --steps 1 --height 32 --width 32"
    assert run(f"eval {out} --against {bfl} {model} {drawing} -q --json".split()) == 0
    assert said(capsys)["images"] == 1


def test_a_checkpoint_may_be_compared_with_the_pipeline_that_is_its_base_too(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.safetensors"
    assert run(f"convert {tiny_flux} --format comfy -o {out} {DATA_FREE}".split()) == 0
    capsys.readouterr()
    both = f"{out} --against {tiny_flux} --base {tiny_flux}/"
    assert run(f"check {both} -q --json".split()) == 0
    assert said(capsys)["same_source"] is True
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    drawing = f"--prompts {prompts} --samples 1 --steps 1 --height 32 --width 32 --without naive,floor"
    assert run(f"eval {both} {drawing} -q --json".split()) == 0
    assert said(capsys)["images"] == 1


def test_a_recipe_names_base_and_loras_beside_itself(
    bfl: Path, lora: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tmp_path / "r.yaml"
    options = f"--base {tiny_flux} --lora {lora}:0.5 --effort datafree --rank 16"
    assert run(f"init {bfl} {options} -o {recipe}".split()) == 0
    capsys.readouterr()
    (tmp_path / "style.safetensors").write_bytes(lora.read_bytes())
    recipe.write_text(recipe.read_text().replace(str(lora), "style.safetensors"))
    out = tmp_path / "out"
    assert run(f"convert {recipe} -o {out} -q --json".split()) == 0
    assert said(capsys)["recipe"]["model"]["loras"] == [{"path": "style.safetensors", "weight": 0.5}]


def test_calibration_of_a_single_file(
    bfl: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    drawing = f"--prompts {prompts} --samples 1 --steps 1 --height 32 --width 32"
    assert run(f"calibrate {bfl} --base {tiny_flux} -o {tmp_path / 'calib'} {drawing} -q".split()) == 0
    capsys.readouterr()
    # what was seen with the file is good for the folder: they hold the same weights
    words = f"convert {tiny_flux} --calib {tmp_path / 'calib'} -o {tmp_path / 'out'} --effort fast --rank 16"
    assert run([*words.split(), "-q", "--json"]) == 0
    assert said(capsys)["data_free"] is False


def test_without_a_base_the_output_is_the_component_and_says_so(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(f"convert {tiny_flux / 'transformer'} -o {tmp_path / 'out'} {DATA_FREE}".split()) == 0
    assert any("--base" in warning for warning in said(capsys)["warnings"])
    assert (tmp_path / "out" / "config.json").is_file()


def test_float8_is_warned_of(
    bfl_state: dict[str, Tensor], tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "fp8.safetensors"
    save_file({n: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for n, t in bfl_state.items()}, file)
    assert run(f"convert {file} --base {tiny_flux} -o {tmp_path / 'out'} {DATA_FREE}".split()) == 0
    assert any("up-converted to bfloat16" in warning for warning in said(capsys)["warnings"])


# ------------------------------------------------------------------------------------------------- refusals


def test_a_single_file_that_needs_a_base_says_so(bfl: Path, capsys: pytest.CaptureFixture[str]):
    error = refused(capsys, f"convert {bfl} -o out", 3)
    assert error["kind"] == "needs-base"
    assert "--base" in error["hint"]


def test_a_truncated_file_is_exit_code_3(
    bfl: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "short.safetensors"
    file.write_bytes(bfl.read_bytes()[:-1])
    error = refused(capsys, f"convert {file} --base {tiny_flux} -o {tmp_path / 'out'}", 3)
    assert (error["kind"], error["where"]) == ("damaged-file", str(file))


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_pickle_is_exit_code_3(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]):
    torch.save({"w": torch.zeros(3)}, tmp_path / name)
    assert refused(capsys, f"convert {tmp_path / name} -o out", 3)["kind"] == "pickle"


def test_a_lora_of_another_width_is_exit_code_3(
    bfl: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "wide.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file(
        {f"{name}.lora_down.weight": torch.zeros(4, 3072), f"{name}.lora_up.weight": torch.zeros(3072, 4)},
        file,
    )
    error = refused(capsys, f"convert {bfl} --base {tiny_flux} --lora {file} -o {tmp_path / 'out'}", 3)
    assert (error["kind"], error["where"]) == ("lora-mismatch", name)


def test_a_model_given_as_a_lora_and_a_lora_given_as_a_model(
    bfl: Path, lora: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert (
        "whole tensors of a model, not a LoRA"
        in refused(capsys, f"convert {tiny_flux} --lora {bfl} -o {tmp_path / 'out'}", 3)["message"]
    )
    assert "--lora" in refused(capsys, f"convert {lora} -o {tmp_path / 'out'}", 3)["hint"]


def test_nan_is_exit_code_3_and_leaves_nothing(
    bfl_state: dict[str, Tensor], tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    state = {name: tensor.clone() for name, tensor in bfl_state.items()}
    state["single_blocks.0.linear1.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    words = f"convert {tmp_path / 'nan.safetensors'} --base {tiny_flux} -o {tmp_path / 'out'}"
    error = refused(capsys, f"{words} --effort datafree --rank 16", 3)
    assert error["kind"] == "not-finite"
    assert "single_blocks.0.linear1.weight" in error["message"]
    assert not (tmp_path / "out").exists()


def test_a_base_for_a_whole_pipeline_is_refused(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert refused(capsys, f"convert {tiny_flux} --base {tiny_flux} -o out", 3)["kind"] == "needless-base"


def test_a_base_that_is_nowhere_is_refused(bfl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert refused(capsys, f"convert {bfl} --base {tmp_path / 'none'} -o out", 3)["kind"] == "not-found"


def test_a_lora_weight_that_is_no_number_is_bad_usage(
    bfl: Path, lora: Path, capsys: pytest.CaptureFixture[str]
):
    assert "is not a weight" in refused(capsys, f"convert {bfl} --lora {lora}:x -o out", 2)["message"]


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA"),
        ("decoder.conv_in.weight", "an autoencoder (VAE)"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "a text encoder"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(
    key: str, what: str, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "file.safetensors"
    save_file({key: torch.zeros(2, 2)}, file)
    for base in ("", f" --base {tiny_flux}"):
        error = refused(capsys, f"convert {file}{base} -o out", 3)
        assert f"{file}: {what}, not a diffusion model" in error["message"]


def test_a_link_to_nowhere_says_where_it_leads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    error = refused(capsys, f"convert {tmp_path / 'model'} -o out", 3)
    assert f"a link to {tmp_path / 'gone'}, which does not exist" in error["message"]


@pytest.mark.parametrize("name", ["m" * 300, "~nobody-of-this-name/model"])
def test_a_name_that_no_file_can_have_is_not_found(name: str, capsys: pytest.CaptureFixture[str]):
    for words in (f"convert {name} -o out", f"check {name}", f"inspect {name}"):
        assert name in refused(capsys, words, 3)["message"]


def test_a_prompt_instead_of_a_prompt_file_is_not_found(tiny_flux: Path, capsys: pytest.CaptureFixture[str]):
    words = ["convert", str(tiny_flux), "-o", "out", "--json", "--prompts", "a lighthouse at dawn, " * 20]
    assert run(words) == 3
    assert said(capsys)["error"]["kind"] == "not-found"
