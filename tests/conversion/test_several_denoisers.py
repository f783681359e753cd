"""Wan 2.2: two transformers, each with its own steps, converted, checked and run as one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.adapters.merge import merge_loras
from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.allocation import GAIN_SAMPLE, layer_gains
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.conversion.record import record_calls
from svdq_cli.entrypoints.inspect import inspect_checkpoint, inspect_source
from svdq_cli.errors import InputError, UsageError
from svdq_cli.evaluation.run import evaluate
from svdq_cli.inference.load import load_pipeline
from svdq_cli.lora.fold import fold
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare, warnings_of
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Recipe, default_recipe
from svdq_cli.recipe.schema import Calibration, Quantization, output_of
from svdq_cli.reconstruct import tuning
from svdq_cli.records import Event, ignore_events
from svdq_cli.reports import ConvertReport
from svdq_cli.solve.rebuild import rebuilt_weight
from svdq_cli.source import denoisers_of, only, open_source, read_tensor, source_digest
from svdq_cli.storage.headers import header_metadata
from tests.tiny_families import tiny_pipeline

CPU = RunOptions(device="cpu")
FIRST, SECOND = "blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q"
COMPONENTS = ("transformer", "transformer_2")
LORA = {"A": (4, 128), "B": (128, 4)}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("wan-2.2", tmp_path_factory.mktemp("two") / "wan")


def recipe_for(folder: Path, **changes: object) -> Recipe:
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red fox\na blue ship\n")
    drawn = {"prompts": str(prompts), "samples": 2, "height": 32, "width": 32, "frames": 5, "steps": 4}
    drawn |= {"max_sequence_length": 16, "rows": 128, "guidance": 3.0, **changes}
    return default_recipe(
        str(folder),
        calibration=Calibration.model_validate(drawn),
        quantization=Quantization.model_validate({"rank": 16, "smoothing": "closed-form"}),
    )


@pytest.fixture(scope="module")
def calibration(wan: Path) -> Path:
    calibrate(recipe_for(wan), wan.parent / "calib", options=CPU)
    return wan.parent / "calib"


@pytest.fixture(scope="module")
def converted(wan: Path, calibration: Path) -> tuple[Path, ConvertReport]:
    out = wan.parent / "out"
    return out, convert(recipe_for(wan), out, calibration=calibration, options=CPU)


def test_names_tell_the_denoisers_apart(wan: Path):
    plan = prepare(recipe_for(wan)).plan
    assert plan.components == COMPONENTS
    names = [layer.name for layer in plan.layers]
    assert len(set(names)) == len(names)
    assert {FIRST, SECOND, "blocks.1.attn1.to_q"} <= set(names)
    assert "transformer_2.blocks.1.attn1.to_q" not in names, "the second has one block"
    queries = next(shared for shared in plan.inputs if shared.name == SECOND)
    assert queries.layers == tuple(f"transformer_2.blocks.0.attn1.to_{each}" for each in "qkv")


def test_each_denoiser_is_calibrated_on_its_own_steps(calibration: Path):
    """Of four steps at 1000, 667, 334 and 1 one is above 0.7 of 1000; guidance makes two passes of each."""
    opened = open_calibration(calibration)
    tokens = 3 * 8 * 8  # 5 frames are 3 of the latents; 32 pixels, 4 a token
    for name, steps in ((FIRST, 1), (SECOND, 3)):
        stats = opened.stats(name)
        assert stats.tokens_seen == 2 * steps * 2 * tokens
        assert stats.rows.shape[0] == 128
    assert not torch.equal(opened.stats(FIRST).abs_max, opened.stats(SECOND).abs_max)


def test_a_denoiser_that_has_no_step_is_named(wan: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"transformer_2\..*never ran it in 1 step\b") as caught:
        calibrate(recipe_for(wan, steps=1), tmp_path / "calib", options=CPU)
    assert "more steps" in str(caught.value.hint)


def test_sizes_and_counts_are_of_both(wan: Path, converted: tuple[Path, ConvertReport]):
    out, report = converted
    parameters = sum(
        sum(tensor.numel() for tensor in load_file(file).values()) for file in open_source(wan).files
    )
    planned = predict(recipe_for(wan), options=CPU)
    assert report.model.parameters == planned.model.parameters == parameters
    assert report.bytes.input == planned.bytes.input == 2 * parameters
    written = [out / name / "diffusion_pytorch_model.safetensors" for name in COMPONENTS]
    assert report.outputs[0].bytes == sum(file.stat().st_size for file in written)
    assert report.layers == planned.layers
    assert SECOND in report.layer_sqnr_db.per_layer
    assert not any("not converted" in warning for warning in report.warnings)


def test_both_denoisers_are_checked_and_inspected(wan: Path, converted: tuple[Path, ConvertReport]):
    out, _ = converted
    source = open_source(wan)
    found = check(out, against=source)
    assert found.status == "ok"
    assert found.layer_error is not None
    assert {FIRST, SECOND} <= found.layer_error.keys()
    names = [{layer.name: layer.role for layer in report.layers} for report in (inspect_checkpoint(out),)]
    assert names[0] == {layer.name: layer.role for layer in inspect_source(recipe_for(wan)).layers}
    assert json.loads((out / "transformer_2" / "config.json").read_text())["num_layers"] == 1


def test_damage_in_the_second_denoiser_is_found(converted: tuple[Path, ConvertReport], tmp_path: Path):
    out = shutil.copytree(converted[0], tmp_path / "damaged")
    file = out / "transformer_2" / "diffusion_pytorch_model.safetensors"
    tensors, metadata = load_file(file), header_metadata(file)
    tensors["proj_out.bias"][0] = torch.nan
    save_file(tensors, file, metadata)
    found = check(out)
    assert [problem.layer for problem in found.problems] == ["transformer_2.proj_out.bias"]


def test_a_loaded_pipeline_runs_both_in_4_bits(converted: tuple[Path, ConvertReport]):
    out, _ = converted
    checkpoint = open_checkpoint(out)
    pipe = cast("Any", load_pipeline(out, device="cpu"))
    for component, denoiser in zip(COMPONENTS, checkpoint.denoisers, strict=True):
        model = getattr(pipe, component)
        running = {module.plan.name for module in model.modules() if hasattr(module, "plan")}
        assert running == {plan.name for plan in denoiser.layers}
    called: list[str] = []
    for component in COMPONENTS:
        getattr(pipe, component).register_forward_pre_hook(lambda *_, name=component: called.append(name))
    video = pipe("a fox", num_inference_steps=4, height=32, width=32, num_frames=5, guidance_scale=1.0)
    assert called == ["transformer", *["transformer_2"] * 3]
    assert len(video.frames[0]) == 5


def test_the_digest_counts_both_denoisers(wan: Path):
    source = open_source(wan)
    digests = {source_digest(source), *(source_digest(part) for part in denoisers_of(source))}
    assert len(digests) == 3
    second = only(source, ["transformer_2"])
    assert second.components == ("transformer_2",)
    assert f"{FIRST}.weight" in second.tensors, "alone, its layers have their own names"


def test_blocks_of_both_are_tuned(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "STEPS", 4)
    monkeypatch.setattr(tuning, "JUDGE_EVERY", 2)
    recipe = recipe_for(wan).model_copy(update={"quantization": Quantization(effort="best", rank=16)})
    blocks = convert(recipe, tmp_path / "out", options=CPU).search.blocks
    assert blocks.keys() == {"blocks.0", "blocks.1", "transformer_2.blocks.0"}
    assert all(search.after <= search.before for search in blocks.values())


def test_ranks_weigh_each_denoiser_by_its_steps(wan: Path):
    """Every layer has a gain; those of one step in four reach the image less often than those of three."""
    prepared = prepare(recipe_for(wan))
    sampling = sampling_for(prepared.recipe, prepared.source)
    gains = layer_gains(prepared, sampling, CPU, torch.device("cpu"), ignore_events)
    assert gains.keys() == {plan.name for plan in prepared.plan.w4a4}
    found = record_calls(
        prepared, sampling, GAIN_SAMPLE, options=CPU, device=torch.device("cpu"), observe=ignore_events
    )
    lengths = {name: {each.length for each in trajectories} for name, (_, trajectories) in found.items()}
    assert lengths == {"transformer": {1}, "transformer_2": {3}}
    assert {len(trajectories) for _, trajectories in found.values()} == {2}, "with the prompt and without"


def test_a_video_is_judged_as_the_strip_of_its_frames(converted: tuple[Path, ConvertReport], wan: Path):
    recipe = recipe_for(wan)
    report = evaluate(converted[0], recipe, options=CPU)
    assert report.images == 2
    assert report.layer_sqnr_db.per_layer.keys() == converted[1].layer_sqnr_db.per_layer.keys()
    assert report.psnr_db.mean > 20


def test_a_run_that_stopped_is_gone_on_with(wan: Path, converted: tuple[Path, ConvertReport], tmp_path: Path):
    """After some layers of the first denoiser: to the same bytes."""

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if event.stage == "solve" and event.kind == "advance" and event.done >= 5:
            raise Stopped

    out, calibration = tmp_path / "out", wan.parent / "calib"
    with pytest.raises(Stopped):
        convert(recipe_for(wan), out, calibration=calibration, options=CPU, observe=stop)
    assert not out.exists()
    report = convert(
        recipe_for(wan), out, calibration=calibration, options=RunOptions(device="cpu", resume=True)
    )
    assert 0 < report.layers_taken_over < len(report.layer_sqnr_db.per_layer)
    assert report.outputs[0].sha256 == converted[1].outputs[0].sha256


def file_of(wan: Path, component: str, path: Path) -> Path:
    shutil.copyfile(wan / component / "diffusion_pytorch_model.safetensors", path)
    return path


@pytest.mark.parametrize(
    ("component", "file", "said"),
    [
        ("transformer", "wan2.2_t2v_high_noise_14B.safetensors", None),
        ("transformer_2", "wan2.2_t2v_low_noise_14B.safetensors", None),
        ("transformer_2", "merge.safetensors", "transformer_2"),
    ],
)
def test_a_file_with_one_of_two_takes_its_place_and_the_other_is_spoken_of(
    wan: Path, tmp_path: Path, component: str, file: str, said: str | None
):
    recipe = recipe_for(wan)
    model = {"source": str(file_of(wan, component, tmp_path / file)), "base": str(wan), "denoiser": said}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})
    prepared = prepare(recipe)
    assert prepared.source.components == (component,)
    other = next(name for name in COMPONENTS if name != component)
    warnings = warnings_of(prepared, data_free=False)
    assert any(warning.startswith(f"{other} (WanTransformer3DModel") for warning in warnings)
    assert any(f"taken to be {component}" in warning for warning in warnings) == (said is None)


def test_the_second_denoiser_is_converted_alone(wan: Path, tmp_path: Path):
    """Its rows come from its own steps; the other runs in 16 bits meanwhile, and is copied."""
    recipe = recipe_for(wan)
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"denoiser": "transformer_2"})}
    )
    out = tmp_path / "out"
    report = convert(recipe, out, options=CPU)
    assert FIRST in report.layer_sqnr_db.per_layer, "alone, its layers have their own names"
    checkpoint = open_checkpoint(out)
    assert checkpoint.source.components == ("transformer_2",)
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (out / weights).read_bytes() == (wan / weights).read_bytes()
    assert check(out, against=open_source(wan)).status == "ok"


def test_a_denoiser_that_is_not_there_is_refused(wan: Path):
    recipe = recipe_for(wan)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"denoiser": "unet"})})
    with pytest.raises(UsageError, match="no denoiser 'unet'") as caught:
        prepare(recipe)
    assert caught.value.hint == "it has transformer, transformer_2"


@pytest.mark.parametrize("fmt", ["comfy", "nunchaku"])
def test_a_file_holds_one_denoiser(wan: Path, fmt: str):
    recipe = recipe_for(wan).model_copy(update={"outputs": (output_of(fmt, "x.safetensors"),)})
    with pytest.raises(UsageError, match="one denoiser a file") as caught:
        prepare(recipe)
    assert "--denoiser" in str(caught.value.hint)


@pytest.mark.parametrize("denoiser", COMPONENTS)
def test_a_lora_says_which_denoiser_it_changes(wan: Path, tmp_path: Path, denoiser: str):
    layer = "blocks.0.attn1.to_q"
    tensors = {f"transformer.{layer}.lora_{name}.weight": torch.ones(shape) for name, shape in LORA.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    source = open_source(wan)
    whole = merge_loras(source, [(tmp_path / "lora.safetensors", 1.0)])
    assert any("merged into transformer only; transformer_2 stays" in text for text in whole.warnings)
    one = merge_loras(only(source, [denoiser]), [(tmp_path / "lora.safetensors", 1.0)])
    assert not any("stays without it" in text for text in one.warnings)
    stored = {"transformer": FIRST, "transformer_2": SECOND}[denoiser]
    before, after = read_tensor(source, f"{stored}.weight"), read_tensor(one, f"{layer}.weight")
    torch.testing.assert_close(after, before.float() + 4)  # rank 4, all ones


def test_a_lora_is_folded_into_one_of_them_by_its_folder(
    converted: tuple[Path, ConvertReport], tmp_path: Path
):
    lora = tmp_path / "lora.safetensors"
    layer = "transformer.blocks.0.attn1.to_q"
    save_file({f"{layer}.lora_{name}.weight": torch.ones(shape) for name, shape in LORA.items()}, lora)
    with pytest.raises(UsageError, match="a LoRA is for one of them") as caught:
        fold(converted[0], [(lora, 1.0)], tmp_path / "both")
    assert str(converted[0] / "transformer_2") in str(caught.value.hint)
    out = shutil.copytree(converted[0], tmp_path / "out")
    fold(converted[0] / "transformer_2", [(lora, 1.0)], tmp_path / "folded")
    shutil.rmtree(out / "transformer_2")
    shutil.copytree(tmp_path / "folded", out / "transformer_2")
    assert check(out).status == "ok"
    before, after = open_checkpoint(converted[0]), open_checkpoint(out)
    plans = {plan.name: plan for plan in after.layers}
    assert plans[FIRST] == next(plan for plan in before.layers if plan.name == FIRST)
    changed = rebuilt_weight(after.solution(plans[SECOND])) - rebuilt_weight(
        before.solution(next(plan for plan in before.layers if plan.name == SECOND))
    )
    torch.testing.assert_close(changed, torch.full((128, 128), 4.0), rtol=0.02, atol=0.02)
