"""What `svdq lora` says when it is done, and what it asks of a disk before it begins."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.cli import run
from svdq_cli.entrypoints.export import export
from svdq_cli.errors import OutOfResourcesError
from svdq_cli.lora.fold import fold
from svdq_cli.source import file_sha256
from tests.adapters.test_loras import peft
from tests.lora.layers import FOUR_BIT, small_lora


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in peft(small_lora(FOUR_BIT)).items()}, file)
    return file


def said(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert run(shlex.split(command)) == 0
    return capsys.readouterr().out


def test_the_next_command_generates_with_the_folded_checkpoint_and_says_its_loras(
    converted_flux: Callable[[str], Path], lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "with a space"
    folded = said(f"lora {converted_flux('int4') / 'lite'} --lora {lora} -o '{out}' -q", capsys)
    assert folded.splitlines()[-1] == f"next: svdq generate '{out}' --prompt TEXT -o FILE"
    sampled = "--steps 1 --width 32 --height 32 --lora"
    command = f"generate '{out}' --prompt TEXT -o {tmp_path}/image.png -q {sampled} {lora}:0.5"
    assert "LoRAs: style.safetensors at 0.5" in said(command, capsys)
    report = json.loads(said(f"{command} --overwrite --json", capsys))
    digest = file_sha256(lora)
    assert report["loras"] == [{"path": str(lora), "weight": 0.5, "sha256": digest, "component": None}]


def test_generate_says_what_it_leaves_out_of_a_lora_in_json_too(
    converted_flux: Callable[[str], Path], lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = {f"lora_te1_x.lora_{half}.weight": torch.ones(1, 1) for half in ("down", "up")}
    more = tmp_path / "more.safetensors"
    save_file({**load_file(lora), **text}, more)
    sampled = "--steps 1 --width 32 --height 32 --json -q"
    out = tmp_path / "image.png"
    command = f"generate {converted_flux('int4') / 'lite'} --prompt TEXT -o {out} --lora {more} {sampled}"
    report = json.loads(said(command, capsys))
    assert f"{more}: left out 2 tensors for the text encoders" in report["warnings"]


def test_a_single_file_is_run_with_a_base_and_a_lora_file_not_by_svdq(
    converted_flux: Callable[[str], Path], lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base, out = converted_flux("int4") / "nunchaku.safetensors", tmp_path / "folded.safetensors"
    report = json.loads(said(f"lora {base} --lora {lora} -o {out} -q --json", capsys))
    assert report["next"] == f"svdq generate {out} --base PIPELINE --prompt TEXT -o FILE"
    alone = f"lora {base} --lora {lora} -o {tmp_path}/lora.safetensors --format nunchaku -q"
    assert "next:" not in said(alone, capsys)


def test_a_disk_has_to_hold_the_copied_components_too(
    converted_flux: Callable[[str], Path], lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = converted_flux("int4")
    whole = sum(file.stat().st_size for file in (folder / "lite").rglob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=whole - 1000))
    with pytest.raises(OutOfResourcesError, match="the disk has"):
        fold(folder / "lite", [LoraFile(lora)], tmp_path / "folded")
    with pytest.raises(OutOfResourcesError, match="the disk has"):
        export(folder / "nunchaku.safetensors", "nunchaku-lite", tmp_path / "out", base=folder / "lite")
    assert list(tmp_path.iterdir()) == []
