"""A plan refuses what the conversion would refuse, with its exit code; for want of memory or disk it shows its figures
all the same."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from svdq_cli.cli import run
from svdq_cli.conversion import machine_speed


def said(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = run([*words, "--effort", "datafree", "--json", "-q"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("where", ["existing", "over the source", "in the source", "twice"])
def test_places_that_a_conversion_may_not_write_to(
    where: str, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    words = ["convert", str(tiny_flux)]
    match where:
        case "existing":
            out.mkdir()
            words += ["-o", str(out)]
        case "over the source":
            words += ["-o", str(tiny_flux), "--overwrite"]
        case "in the source":
            words += ["-o", str(tiny_flux / "out")]
        case _:
            recipe = tmp_path / "recipe.yaml"
            outputs = f"[{{path: {out}}}, {{format: comfy, path: {out}/model.safetensors}}]"
            recipe.write_text(f"version: 1\nmodel: {{source: {tiny_flux}}}\noutputs: {outputs}\n")
            words = ["convert", str(recipe)]
    code, planned = said([*words, "--plan"], capsys)
    assert code == 2
    assert (code, planned) == said(words, capsys)


def test_recipes_that_write_to_one_place(tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for file in files:
        file.write_text(
            f"version: 1\nmodel: {{source: {tiny_flux}}}\noutputs: [{{path: {tmp_path / 'out'}}}]\n"
        )
    code, report = said(["convert", *map(str, files), "--plan"], capsys)
    assert code == 2
    assert [each["code"] for each in report["runs"]] == [0, 2]
    assert report["runs"][1]["report"]["error"]["kind"] == "output-exists"


def test_a_limit_of_memory_that_no_layer_is_solved_in(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["convert", str(tiny_flux), "-o", str(tmp_path / "out"), "--max-ram", "1MB"]
    code, planned = said([*words, "--plan"], capsys)
    refused, converted = said(words, capsys)
    assert code == refused == 5
    assert (planned["status"], planned["error"]["kind"]) == ("error", "out-of-memory")
    assert planned["error"]["where"] == converted["error"]["where"]
    assert planned["bytes"]["output"] > 0
    elsewhere, report = said([*words, "--plan", "--gpu", "12GB"], capsys)
    assert (elsewhere, report["status"], report["error"]) == (0, "planned", None)


def test_a_full_disk(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    words = ["convert", str(tiny_flux), "-o", str(tmp_path / "out")]
    code, planned = said([*words, "--plan"], capsys)
    refused, converted = said(words, capsys)
    assert code == refused == 5
    assert planned["error"] == converted["error"]
    assert planned["error"]["kind"] == "disk-full"
    assert planned["disk_bytes"] > 1000
    assert run([*words, "--plan", "--effort", "datafree"]) == 5
    shown = capsys.readouterr()
    assert "disk" in shown.out
    assert "the disk has 0.0 MB left" in shown.err


def test_a_disk_too_full_to_be_measured_is_measured_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = machine_speed._rates_in

    def full(folder: Path) -> tuple[float, float]:
        if folder == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return measured(folder)

    monkeypatch.setattr(machine_speed, "_rates_in", full)
    monkeypatch.setattr(machine_speed, "FILE_BYTES", 2**20)
    assert min(machine_speed._disk_rates(tmp_path)) > 0
