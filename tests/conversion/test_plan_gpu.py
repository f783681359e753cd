"""`--plan --gpu`: what converting and generating would take on a card that is not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svdq_cli.cli import run
from svdq_cli.conversion.plan import predict
from svdq_cli.conversion.plan_gpu import CONTEXT
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Calibration, Quantization, Recipe, default_recipe
from svdq_cli.reports import GpuConversion, GpuFacts
from svdq_cli.system.graphics_cards import Card, card_named

CPU = RunOptions(device="cpu")


@pytest.fixture(scope="module")
def recipe(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red circle\n")
    wanted = Calibration(prompts=str(prompts), samples=1, steps=2, height=64, width=64)
    return default_recipe(
        str(tiny_flux), calibration=wanted, quantization=Quantization(effort="fast", rank=16)
    )


def _on(recipe: Recipe, card: Card) -> GpuFacts:
    gpu = predict(recipe, options=CPU, card=card).gpu
    assert gpu is not None
    return gpu


def test_a_limit_of_gpu_memory_needs_a_gpu_and_is_the_conversions(recipe: Recipe):
    limited = RunOptions(device="cpu", max_vram=1000)
    assert any("--max-vram has no effect" in warning for warning in predict(recipe, options=limited).warnings)
    planned = predict(recipe, options=limited, card=card_named("24GB"))
    assert not any("--max-vram" in warning for warning in planned.warnings)
    assert planned.gpu is not None
    assert not planned.gpu.convert.fits
    assert planned.gpu.generate.fits


def test_a_limit_of_host_memory_that_no_layer_is_solved_in_does_not_fit(recipe: Recipe):
    def planned(max_ram: int) -> GpuConversion:
        options = RunOptions(device="cpu", max_ram=max_ram)
        gpu = predict(recipe, options=options, card=card_named("RTX 4090")).gpu
        assert gpu is not None
        return gpu.convert

    impossible = planned(10**6)
    assert (impossible.fits, impossible.seconds) == (False, None)
    assert impossible.lack is not None
    assert "--max-ram allows 0.001 GB" in impossible.lack
    assert (planned(10**12).fits, planned(10**12).lack) == (True, None)


def test_a_faster_card_takes_less_time_and_the_range_has_two_ends(recipe: Recipe):
    slow, fast = (_on(recipe, card_named(name)) for name in ("RTX 3050", "RTX 5090"))
    assert slow.convert.seconds is not None
    assert fast.convert.seconds is not None
    assert fast.convert.seconds[0] < fast.convert.seconds[1] < slow.convert.seconds[1]
    assert "not been measured" in slow.basis


def test_everything_on_the_card_takes_more_than_one_component_at_a_time(recipe: Recipe, tiny_flux: Path):
    generate = _on(recipe, card_named("RTX 4090")).generate
    assert (generate.fits, generate.fits_with_offload) == (True, True)
    encoders = sum(file.stat().st_size for file in tiny_flux.glob("text_encoder*/*.safetensors"))
    assert generate.peak_bytes >= generate.offload_peak_bytes + encoders // 2 > 0


def test_a_card_with_room_for_one_component_at_a_time_offloads(recipe: Recipe):
    roomy = _on(recipe, card_named("RTX 4090")).generate
    between = (roomy.peak_bytes + roomy.offload_peak_bytes) // 2
    generate = _on(recipe, Card("small", CONTEXT + between)).generate
    assert (generate.fits, generate.fits_with_offload) == (False, True)


def test_a_card_without_room_for_one_block_converts_nothing_that_is_calibrated(recipe: Recipe):
    tiny = Card("tiny", CONTEXT + 1000, card_named("RTX 4090").published)
    convert = _on(recipe, tiny).convert
    assert (convert.fits, convert.seconds) == (False, None)
    assert convert.peak_bytes > 1000
    data_free = recipe.model_copy(update={"calibration": None})
    assert _on(data_free, tiny).convert.fits, "what does not fit is solved on the CPU"


def test_a_card_of_which_only_the_memory_is_known_has_no_times(recipe: Recipe):
    gpu = _on(recipe, card_named("12GB"))
    assert (gpu.memory_bytes, gpu.convert.fits, gpu.convert.seconds) == (12 * 10**9, True, None)


def test_the_command_says_it_in_json_and_on_the_screen(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = f"convert {tiny_flux} -o {tmp_path / 'out'} --plan --device cpu".split()
    assert run([*words, "--gpu", "rtx 4070", "--json"]) == 0
    gpu = json.loads(capsys.readouterr().out)["gpu"]
    assert gpu["name"] == "RTX 4070"
    assert set(gpu["convert"]) >= {"fits", "seconds", "peak_bytes"}
    assert set(gpu["generate"]) >= {"fits", "fits_with_offload", "peak_bytes"}
    assert run([*words, "--gpu", "rtx 4070"]) == 0
    printed = capsys.readouterr().out
    assert "RTX 4070, 12 GiB" in printed
    assert "fits, " in printed
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu"] is None
    assert run([*words, "--gpu", "potato"]) == 2
    assert run([word for word in words if word != "--plan"] + ["--gpu", "12GB"]) == 2
