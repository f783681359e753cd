"""Wan 2.2: two transformers, each with its own steps, converted, checked and run as one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.allocation import GAIN_SAMPLE, layer_gains
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.conversion.record import record_calls
from svdq_cli.entrypoints.check import check_against
from svdq_cli.entrypoints.inspect import inspect_checkpoint, inspect_source
from svdq_cli.errors import InputError, UsageError
from svdq_cli.evaluation.run import evaluate
from svdq_cli.inference.load import load_pipeline
from svdq_cli.lora.attach import load_lora, set_adapters, unload_lora
from svdq_cli.lora.fold import fold
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare, warnings_of
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Lora, Recipe, default_recipe
from svdq_cli.recipe.schema import Calibration, Quantization, output_of
from svdq_cli.reconstruct import tuning
from svdq_cli.records import Event, ignore_events
from svdq_cli.reports import ConvertReport
from svdq_cli.solve.rebuild import rebuilt_weight
from svdq_cli.source import Source, denoisers_of, only, open_source, read_tensor, source_digest
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
    assert found.noted_error == found.layer_error, "nothing has changed since the conversion noted them"
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


def test_both_are_tuned(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "STEPS", 4)
    monkeypatch.setattr(tuning, "JUDGE_EVERY", 1)
    monkeypatch.setattr(tuning, "WARM_UP", 1)
    recipe = recipe_for(wan).model_copy(update={"quantization": Quantization(effort="best", rank=16)})
    found = convert(recipe, tmp_path / "out", options=CPU).search.tuning
    assert list(found) == list(COMPONENTS)
    assert all(search.after <= search.before for search in found.values())


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


# ------------------------------------------------------------------------------------------------- LoRAs


def lora_at(path: Path, *, layer: str = FIRST, prefix: str = "diffusion_model.") -> Path:
    """A LoRA of ones, which adds 4 to every number of one layer: its rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{prefix}{layer}.lora_{name}.weight": torch.ones(shape) for name, shape in LORA.items()}, path
    )
    return path


def changed_by(source: Source, merged: Source) -> dict[str, float]:
    """By tensor of the model, what was added to each of its numbers."""
    names = [f"{name}.weight" for name in (FIRST, SECOND)]
    differences = {
        name: read_tensor(merged, name).float() - read_tensor(source, name).float() for name in names
    }
    return {name: float(added.mean()) for name, added in differences.items() if added.any()}


def with_loras(wan: Path, *loras: Lora) -> Recipe:
    recipe = recipe_for(wan)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"loras": loras})})


@pytest.mark.parametrize(
    ("name", "component", "where"),
    [
        ("wan_t2v_lightx2v_4steps_high_noise.safetensors", None, FIRST),
        ("wan_t2v_lightx2v_4steps_low_noise.safetensors", None, SECOND),
        ("LowNoise.safetensors", None, SECOND),
        ("low_noise/pytorch_lora_weights.safetensors", None, SECOND),
        ("style.safetensors", "transformer", FIRST),
        ("style.safetensors", "transformer_2", SECOND),
        ("high_noise.safetensors", "transformer_2", SECOND),
    ],
)
def test_a_lora_goes_where_the_user_or_its_name_says(
    wan: Path, tmp_path: Path, name: str, component: str | None, where: str
):
    lora = LoraFile(lora_at(tmp_path / name), 0.5, component)
    source = open_source(wan)
    merged = merge_loras(source, [lora])
    assert changed_by(source, merged) == {f"{where}.weight": pytest.approx(2, abs=0.01)}
    left = "transformer_2" if where == FIRST else "transformer"
    (*said, last) = merged.warnings
    assert last.startswith(f"no LoRA is for {left}")
    if component is None:
        assert any("by its name for" in text for text in said)
    elif name.startswith("high"):
        assert any("though its name says transformer" in text for text in said)


def test_names_of_layers_tell_the_denoiser(wan: Path, tmp_path: Path):
    """Before the file's own name: whoever wrote them knew."""
    source = open_source(wan)
    second = LoraFile(lora_at(tmp_path / "high_noise.safetensors", prefix="transformer_2."))
    assert [*changed_by(source, merge_loras(source, [second]))] == [f"{SECOND}.weight"]
    alone = only(source, ["transformer_2"])
    merged = merge_loras(alone, [second])
    assert not torch.equal(read_tensor(merged, f"{FIRST}.weight"), read_tensor(alone, f"{FIRST}.weight"))


def test_a_lora_that_fits_one_denoiser_alone_is_for_that_one(wan: Path, tmp_path: Path):
    """The first has two blocks, the second one."""
    lora = LoraFile(lora_at(tmp_path / "style.safetensors", layer="blocks.1.attn1.to_q"))
    merged = merge_loras(open_source(wan), [lora])
    assert any("for transformer, the only denoiser that it fits" in text for text in merged.warnings)


def test_a_lora_of_which_nothing_tells_the_denoiser_is_refused(wan: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="nothing tells for which") as caught:
        merge_loras(open_source(wan), [LoraFile(lora_at(tmp_path / "flow_noise.safetensors"), 0.8)])
    assert "--lora FILE:0.8:transformer_2" in str(caught.value.hint)
    assert "component: transformer_2" in str(caught.value.hint)


def test_a_lora_that_fits_no_denoiser_or_names_one_that_is_not_there_is_refused(wan: Path, tmp_path: Path):
    source = open_source(wan)
    foreign = lora_at(tmp_path / "flux.safetensors", layer="transformer_blocks.0.attn.to_q")
    with pytest.raises(InputError, match=r"none of its 1 layers .*nor does it fit transformer_2"):
        merge_loras(source, [LoraFile(foreign)])
    with pytest.raises(UsageError, match="no denoiser 'unet'") as caught:
        merge_loras(source, [LoraFile(lora_at(tmp_path / "style.safetensors"), 1.0, "unet")])
    assert caught.value.hint == "there is transformer and transformer_2"


def test_a_pair_is_merged_each_into_its_own_and_found_again(wan: Path, tmp_path: Path, calibration: Path):
    """Trainers give both files one name; check finds them by their digests, whichever folder they are in."""
    high, low = (lora_at(tmp_path / noise / "pytorch_lora_weights.safetensors") for noise in ("high", "low"))
    recipe = with_loras(
        wan,
        Lora(path=str(high), component="transformer"),
        Lora(path=str(low), weight=0.5, component="transformer_2"),
    )
    recipe = recipe.model_copy(update={"quantization": Quantization(rank=16, effort="datafree")})
    out = tmp_path / "out"
    report = convert(recipe, out, options=CPU)
    assert not any("LoRA" in text for text in report.warnings)
    made = json.loads(header_metadata(out / "transformer_2" / "diffusion_pytorch_model.safetensors")["svdq"])
    assert [lora["component"] for lora in made["recipe"]["model"]["loras"]] == [*COMPONENTS]
    assert made["loras_sha256"].keys() == {
        f"{noise}/pytorch_lora_weights.safetensors" for noise in ("high", "low")
    }
    found = check_against(out, recipe_for(wan))
    assert (found.status, found.same_source) == ("ok", True)
    assert found.loras == (
        "high/pytorch_lora_weights.safetensors:1:transformer",
        "low/pytorch_lora_weights.safetensors:0.5:transformer_2",
    )
    for component in COMPONENTS:
        alone = check_against(out / component, recipe_for(wan))
        assert alone.status == "ok", "one of them next to its own LoRA and its own noted errors"


def test_what_a_name_told_is_recorded(wan: Path, tmp_path: Path):
    low = lora_at(tmp_path / "low_noise.safetensors")
    prepared = prepare(with_loras(wan, Lora(path=str(low))))
    assert [lora.component for lora in prepared.recipe.model.loras] == ["transformer_2"]


def test_a_pair_is_folded_each_into_its_own(wan: Path, converted: tuple[Path, ConvertReport], tmp_path: Path):
    high, low = (lora_at(tmp_path / f"{noise}_noise.safetensors") for noise in ("high", "low"))
    out = tmp_path / "folded"
    report = fold(converted[0], [LoraFile(high, 0.5), LoraFile(low)], out)
    assert [lora.component for lora in report.loras] == [*COMPONENTS]
    assert [row.layers for row in report.keys] == [(FIRST,), (SECOND,)]
    assert added_by(converted[0], out) == {FIRST: 2, SECOND: 4}
    found = check_against(out, recipe_for(wan))
    assert (found.status, found.same_source) == ("ok", True)
    assert found.loras == ("high_noise.safetensors:0.5:transformer", "low_noise.safetensors:1:transformer_2")
    load_pipeline(out, device="cpu")


def test_a_denoiser_without_a_lora_keeps_its_bytes_and_rank(
    converted: tuple[Path, ConvertReport], tmp_path: Path
):
    out = tmp_path / "folded"
    report = fold(converted[0], [LoraFile(lora_at(tmp_path / "low_noise.safetensors"))], out)
    assert report.warnings[-1].startswith("no LoRA is for transformer:")
    before, after = open_checkpoint(converted[0]), open_checkpoint(out)
    assert [each.rank for each in after.denoisers] == [16, 32]
    for name in before.denoisers[0].source.tensors:
        assert torch.equal(read_tensor(before.source, name), read_tensor(after.source, name)), name


def test_a_lora_is_folded_into_one_of_them_by_its_folder(
    wan: Path, converted: tuple[Path, ConvertReport], tmp_path: Path
):
    lora = lora_at(tmp_path / "lora.safetensors")
    out = shutil.copytree(converted[0], tmp_path / "out")
    fold(converted[0] / "transformer_2", [LoraFile(lora)], tmp_path / "folded")
    shutil.rmtree(out / "transformer_2")
    shutil.copytree(tmp_path / "folded", out / "transformer_2")
    assert check(out).status == "ok"
    assert added_by(converted[0], out) == {SECOND: 4}


def added_by(before: Path, after: Path) -> dict[str, int]:
    """By layer, what folding added to every number of its weight."""
    found: dict[str, int] = {}
    first, second = open_checkpoint(before), open_checkpoint(after)
    for name, plan in second.by_name.items():
        added = rebuilt_weight(second.solution(plan)) - rebuilt_weight(first.solution(first.by_name[name]))
        if added.any():
            # factors in bfloat16
            torch.testing.assert_close(added, added.mean().round().expand_as(added), rtol=0.02, atol=0.02)
            found[name] = round(float(added.mean()))
    return found


def test_a_pair_runs_next_to_the_layers_under_one_name(converted: tuple[Path, ConvertReport], tmp_path: Path):
    pipe = cast("Any", load_pipeline(converted[0], device="cpu"))
    high, low = (lora_at(tmp_path / f"{noise}_noise.safetensors") for noise in ("high", "low"))
    load_lora(pipe, high, "style")
    load_lora(pipe, low, "style")
    set_adapters(pipe, {"style": 0.5})
    assert ranks_of(pipe) == {"transformer": 32, "transformer_2": 32}
    with pytest.raises(UsageError, match="'style' is loaded"):
        load_lora(pipe, low, "style")
    with pytest.raises(UsageError, match="nothing tells for which"):
        load_lora(pipe, lora_at(tmp_path / "style.safetensors"), "other")
    load_lora(pipe, tmp_path / "style.safetensors", "other", component="transformer_2")
    set_adapters(pipe, {"other": 1.0})
    assert ranks_of(pipe) == {"transformer": 16, "transformer_2": 32}
    unload_lora(pipe, "style")
    with pytest.raises(UsageError, match="no LoRA named 'style'") as caught:
        set_adapters(pipe, {"style": 1.0})
    assert caught.value.hint == "loaded: other"


def test_diffusers_own_method_loads_into_either(converted: tuple[Path, ConvertReport], tmp_path: Path):
    """As diffusers' documentation of Wan 2.2 has it: a name for each, both set at once."""
    pipe = cast("Any", load_pipeline(converted[0], device="cpu"))
    lora = lora_at(tmp_path / "lightning.safetensors")
    pipe.load_lora_weights(str(lora), adapter_name="lightning")
    assert ranks_of(pipe) == {"transformer": 32, "transformer_2": 16}
    pipe.load_lora_weights(str(lora), adapter_name="lightning_2", load_into_transformer_2=True)
    assert ranks_of(pipe) == {"transformer": 32, "transformer_2": 32}
    assert pipe.get_list_adapters() == {"transformer": ["lightning"], "transformer_2": ["lightning_2"]}
    pipe.set_adapters(["lightning", "lightning_2"], [1.0, 0.0])
    assert ranks_of(pipe) == {"transformer": 32, "transformer_2": 16}
    pipe.delete_adapters("lightning_2")
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}


def ranks_of(pipe: Any) -> dict[str, int]:
    """The rank that each denoiser's first queries run with now."""
    return {name: getattr(pipe, name).get_submodule(FIRST).branch.down.shape[0] for name in COMPONENTS}
