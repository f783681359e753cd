"""Calibration of whole pipelines: stopped and gone on with, offloaded, within a byte budget."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from svdq_cli.calibration import open_calibration
from svdq_cli.calibration.budget import covariances_bytes, rows_within, statistics_bytes
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.kept_tokens import input_widths, kept_tokens
from svdq_cli.errors import CanceledRunError, InterruptedRunError, OutOfResourcesError, Terminated, UsageError
from svdq_cli.formats import format_named
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import counts_of, prepare
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, Recipe, default_recipe, with_overrides
from svdq_cli.records import Event, Int4
from tests.full_size import FLUX_DEV, full_size_plan

CPU = RunOptions(device="cpu")
PROMPTS = "a red circle\ntwo cats\na small blue square\n"


@pytest.fixture
def recipe(tiny_flux: Path, tmp_path: Path) -> Recipe:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS)
    wanted = Calibration(prompts=str(prompts), steps=2, height=16, width=16, samples=3, rows=64)
    return default_recipe(str(tiny_flux), calibration=wanted)


def test_a_conversion_that_is_stopped_while_it_calibrates_says_what_is_kept(recipe: Recipe, tmp_path: Path):
    """Not "0 of 26 layer groups solved": the images that were generated are there."""

    def stop_in_the_second_image(event: Event) -> None:
        if event.stage == "calibrate" and event.done == 3:
            raise Terminated

    with pytest.raises(InterruptedRunError) as caught:
        convert(recipe, tmp_path / "out", options=CPU, observe=stop_in_the_second_image)
    assert "keeps 1 of 3 batches of calibration images; continue with --resume" in str(caught.value.hint)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_calibration_that_is_gone_on_with_has_the_bytes_of_one_that_was_not_stopped(
    recipe: Recipe, tmp_path: Path
):
    calibrate(recipe, tmp_path / "whole", options=CPU)
    out = tmp_path / "stopped"

    def stop_in_the_second_image(event: Event) -> None:
        if event.stage == "calibrate" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(CanceledRunError) as caught:
        calibrate(recipe, out, options=CPU, observe=stop_in_the_second_image)
    assert "1 of 3 batches of images; continue with --resume" in str(caught.value.hint)
    assert not out.exists()
    with pytest.raises(UsageError, match="unfinished run"):
        calibrate(recipe, out, options=CPU)
    events: list[Event] = []
    calibrate(recipe, out, options=RunOptions(device="cpu", resume=True), observe=events.append)
    assert min(event.done for event in events if event.stage == "calibrate") == 2
    assert _bytes(out) == _bytes(tmp_path / "whole")
    assert not (tmp_path / ".stopped.work").exists()


def test_a_calibration_that_is_gone_on_with_asks_for_no_disk_that_its_work_has(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop_in_the_second_image(event: Event) -> None:
        if event.stage == "calibrate" and event.done == 3:
            raise KeyboardInterrupt

    def asked(out: Path, options: RunOptions) -> float:
        """Megabytes, where there is no room at all."""
        with pytest.raises(OutOfResourcesError) as caught:
            calibrate(recipe, out, options=options)
        found = re.search(r"needs ([\d.]+) MB", str(caught.value))
        assert found is not None
        return float(found[1])

    with pytest.raises(CanceledRunError):
        calibrate(recipe, tmp_path / "out", options=CPU, observe=stop_in_the_second_image)
    left = sum(file.stat().st_size for file in (tmp_path / ".out.work").rglob("*") if file.is_file())
    assert left > 100_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    rest = asked(tmp_path / "out", RunOptions(device="cpu", resume=True))
    assert rest == pytest.approx(asked(tmp_path / "new", CPU) - left / 1e6, abs=0.11), "of printed tenths"


def test_other_settings_are_not_gone_on_with(recipe: Recipe, tmp_path: Path):
    def stop(event: Event) -> None:
        if event.stage == "calibrate" and event.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(CanceledRunError):
        calibrate(recipe, tmp_path / "out", options=CPU, observe=stop)
    assert recipe.calibration is not None
    other = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"steps": 3})})
    with pytest.raises(UsageError, match="steps: 2 -> 3"):
        calibrate(other, tmp_path / "out", options=RunOptions(device="cpu", resume=True))


def test_a_model_larger_than_memory_gives_the_same_bytes(recipe: Recipe, tmp_path: Path):
    whole = calibrate(recipe, tmp_path / "whole", options=CPU)
    # 1 byte: no weight may stay, every layer's is read from the file when it runs
    offloaded = calibrate(recipe, tmp_path / "offloaded", options=RunOptions(device="cpu", max_ram=1))
    assert offloaded.digest == whole.digest
    assert _bytes(tmp_path / "offloaded") == _bytes(tmp_path / "whole")


def test_a_text_encoder_larger_than_the_gpu_gives_the_same_bytes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It stays in host memory. The device that lacks the room is this CPU, which stands in for a GPU."""
    from transformers import T5EncoderModel

    refused: list[object] = []

    def to(self: T5EncoderModel, *where: Any, **more: Any) -> torch.nn.Module:
        if where == (torch.device("cpu"),):
            refused.append(self)
            raise torch.OutOfMemoryError
        return torch.nn.Module.to(self, *where, **more)

    whole = calibrate(recipe, tmp_path / "whole", options=CPU)
    monkeypatch.setattr(T5EncoderModel, "to", to)
    crowded = calibrate(recipe, tmp_path / "crowded", options=CPU)
    assert refused
    assert crowded.digest == whole.digest
    assert _bytes(tmp_path / "crowded") == _bytes(tmp_path / "whole")


def test_sigterm_ends_with_75_and_says_how_to_go_on(recipe: Recipe, tiny_flux: Path, tmp_path: Path):
    assert recipe.calibration is not None
    out = tmp_path / "calib"
    command = [sys.executable, "-m", "svdq_cli", "calibrate", str(tiny_flux), "-o", str(out)]
    command += ["--prompts", str(recipe.calibration.prompts), "--samples", "3", "--steps", "30"]
    command += ["--width", "16", "--height", "16", "--device", "cpu", "--events", str(tmp_path / "events")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / ".calib.work" / "pictures"
    while process.poll() is None and not (parts / "000000.safetensors").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert "batches of images" in said
    assert "--resume" in said
    assert not out.exists()


def test_a_flux_dev_calibration_takes_at_most_20_gb(tmp_path: Path):
    plan, _ = full_size_plan(tmp_path, FLUX_DEV, format_named("nunchaku-lite"), Int4())
    wanted = Calibration(prompts="general.txt")
    widths = input_widths(plan)
    rows = rows_within(widths, rows=wanted.rows, budget=wanted.size_bytes)
    assert rows == wanted.rows, "all rows fit"
    assert statistics_bytes(widths, rows=rows) <= 20e9
    many = rows_within(widths, rows=100_000, budget=wanted.size_bytes)
    assert 19.9e9 < statistics_bytes(widths, rows=many) <= 20e9


def test_the_artefact_takes_what_its_plan_said(recipe: Recipe, tmp_path: Path):
    assert recipe.calibration is not None
    small = recipe.calibration.model_copy(update={"size_budget": 20_000, "rows": 256})
    with pytest.raises(UsageError, match="size_budget"):
        calibrate(recipe.model_copy(update={"calibration": small}), tmp_path / "none", options=CPU)
    report = calibrate(recipe, tmp_path / "calib", options=CPU)
    stored = open_calibration(tmp_path / "calib").manifest
    widths, tokens = zip(*((entry.k, entry.covariance_tokens) for entry in stored.inputs), strict=True)
    assert report.covariances == sum(count > 0 for count in tokens) > 0
    # headers and inputs with fewer tokens than rows are the difference
    most = statistics_bytes(widths, rows=64) + covariances_bytes(widths, tokens)
    assert report.bytes == pytest.approx(most, rel=0.25)


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_a_calibration_asks_for_the_disk_that_its_tokens_take(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, true_cfg: float
):
    """Not for the rows that the recipe allows: three images of two steps have far fewer."""
    assert recipe.calibration is not None
    own = {"rows": 1 << 20, "true_cfg": true_cfg, "guidance": 1.0, "max_sequence_length": 24}
    wanted = recipe.calibration.model_copy(update=own)
    recipe = recipe.model_copy(update={"calibration": wanted})
    written = calibrate(recipe, tmp_path / "first", options=CPU).bytes
    usage = shutil.disk_usage(tmp_path)

    def with_room(room: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room))

    with_room(written)  # the files of batches take as much besides
    with pytest.raises(OutOfResourcesError, match="the disk has"):
        calibrate(recipe, tmp_path / "second", options=CPU)
    with_room(3 * written)
    assert calibrate(recipe, tmp_path / "second", options=CPU).bytes == written


def test_a_conversion_has_the_same_tensors_whatever_torchs_default_dtype_is_meanwhile(
    recipe: Recipe, tmp_path: Path
):
    """Loading a model of transformers sets it for a while, for all threads."""
    recipe = with_overrides(recipe, {"quantization.effort": "fast", "quantization.rank": 16})
    found: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            (output,) = convert(recipe, tmp_path / str(dtype), options=CPU).outputs
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(output.tensors_sha256)
    assert found[0] == found[1]


def test_a_forecast_keeps_the_tokens_that_a_calibration_keeps(recipe: Recipe, tmp_path: Path):
    assert recipe.calibration is not None
    wanted = recipe.calibration.model_copy(update={"max_sequence_length": 24, "true_cfg": 3.0, "rows": 200})
    recipe = recipe.model_copy(update={"calibration": wanted})
    calibrate(recipe, tmp_path / "calib", options=CPU)
    prepared = prepare(recipe, every_layer=True)
    sampling = sampling_for(recipe, prepared.source)
    kept = kept_tokens(prepared, sampling, counts_of(prepared, sampling.settings))
    stored = open_calibration(tmp_path / "calib").manifest.inputs
    assert {entry.name: entry.rows for entry in stored} == kept.rows
    assert {entry.name: entry.covariance_tokens for entry in stored} == kept.covariance_tokens
    assert len(set(kept.rows.values())) > 1, "of modulations and of tokens"


def test_covariances_are_kept_for_who_rounds_with_them(recipe: Recipe, tmp_path: Path):
    fast = with_overrides(recipe, {"quantization.effort": "fast"})
    assert calibrate(fast, tmp_path / "fast", options=CPU).covariances == 0
    convert(recipe, tmp_path / "out", options=CPU)
    found = json.loads((tmp_path / "out" / "svdq_report.json").read_text())["search"]["layers"]
    informed = {name for name, layer in found.items() if layer["covariance_tokens"]}
    taken = {name for name, layer in found.items() if "gptq" in layer["steps_taken"]}
    assert informed
    assert informed <= taken
