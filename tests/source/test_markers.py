"""Markers, wrappers and types that other tools leave in a file change neither the weights nor go by unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.entrypoints.export import export
from svdq_cli.errors import InputError
from svdq_cli.inference.load import load_16bit_pipeline, load_pipeline
from svdq_cli.recipe import Output, default_recipe, with_overrides
from svdq_cli.reports import ConvertReport
from svdq_cli.sampling.schedulers import scheduler_with
from svdq_cli.source import open_source, source_digest
from svdq_cli.source.original_names import FLUX1, LDM_UNET
from svdq_cli.storage.json_files import read_json
from tests.source.originals import original_state
from tests.source.test_single_file import weights_of
from tests.tiny_families import tiny_pipeline

CPU = torch.device("cpu")
EMPTY = torch.zeros(0)
LDM = "model.diffusion_model."
V_PREDICTION = {"v_pred": EMPTY, "ztsnr": EMPTY}
SETTINGS = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def saved(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def same_model(file: Path, base: Path) -> bool:
    return source_digest(open_source(file, base=base)) == source_digest(open_source(base))


@pytest.fixture(scope="module")
def bfl(tiny_flux: Path) -> dict[str, Tensor]:
    return original_state(FLUX1, weights_of(tiny_flux))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sdxl", tmp_path_factory.mktemp("sdxl") / "sdxl")


@pytest.fixture(scope="module")
def ldm(sdxl: Path) -> dict[str, Tensor]:
    (file,) = (sdxl / "unet").glob("*.safetensors")
    return below(LDM, original_state(LDM_UNET, load_file(file)))


# ------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module.",
        "net.",
        "model.",
        "dit.",
        "pipe.dit.",
        "base_model.model.",
        "model.diffusion_model.",
        "module._orig_mod.",
        "model.module.",
        "base_model.model.model.diffusion_model._orig_mod.",
        "pipeline.transformer.",
    ],
)
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_what_wrappers_put_before_names_is_taken_off(
    tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path, prefix: str, names: str
):
    state = bfl if names == "original" else weights_of(tiny_flux)
    assert same_model(saved(below(prefix, state), tmp_path / "m.safetensors"), tiny_flux)


@pytest.mark.parametrize("word", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_what_wrappers_of_single_blocks_put_into_names_is_taken_out(
    tiny_flux: Path, tmp_path: Path, word: str
):
    state = {
        name.replace("transformer_blocks.0.", f"transformer_blocks.0.{word}."): tensor
        for name, tensor in weights_of(tiny_flux).items()
    }
    assert same_model(saved(state, tmp_path / "m.safetensors"), tiny_flux)


@pytest.mark.parametrize("prefix", ["module.", "model.diffusion_model._orig_mod."])
def test_of_a_class_without_known_names_the_wrappers_are_taken_off_too(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, prefix: str
):
    """As of every class that svdq has no table of: here Lumina, told by its base alone."""
    from diffusers import Lumina2Transformer2DModel

    folder = tmp_path / "base"
    model = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=64, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, cap_feat_dim=32, axes_dim_rope=(8, 12, 12),
    )  # fmt: skip
    model.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "Lumina2Pipeline", "transformer": ["a", "b"]}')
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    beside = {"vae.decoder.conv_in.weight": torch.zeros(2, 2)}
    assert same_model(saved({**below(prefix, state), **beside}, tmp_path / "m.safetensors"), folder)


def test_of_two_whole_models_neither_is_taken(tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path):
    for number, tensors in enumerate([{**bfl, **below(LDM, bfl)}, {**below("module.", bfl), **bfl}]):
        file = saved(tensors, tmp_path / f"{number}.safetensors")
        with pytest.raises(InputError, match="both map to") as caught:
            open_source(file, base=tiny_flux)
        assert caught.value.kind == "claimed-twice"


@pytest.mark.parametrize("second", ["", "diffusion_model.", "module.model."])
def test_two_keys_for_one_tensor_are_an_error_that_names_both(
    tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path, second: str
):
    file = saved({**below(LDM, bfl), second + "img_in.weight": torch.zeros(3)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError) as caught:
        open_source(file, base=tiny_flux)
    assert f"{LDM}img_in.weight and {second}img_in.weight both map to" in caught.value.message
    assert caught.value.kind == "claimed-twice"


def test_two_spellings_of_one_parameter_are_an_error_that_names_both(
    tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path
):
    """BFL calls a norm's weight `scale`; files that were renamed by hand have both."""
    norm = "double_blocks.0.img_attn.norm.query_norm"
    file = saved({**bfl, f"{norm}.weight": bfl[f"{norm}.scale"]}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=rf"{norm}\.scale and {norm}\.weight both map to"):
        open_source(file, base=tiny_flux)


# ------------------------------------------------------------------------------------------------- 8-bit floats


def scaled_float8(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As ComfyUI has it, with its marker; and the same numbers at 16 bits."""
    eight: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    sixteen: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            scale = (tensor.float().abs().max() / 448).reshape(())
            eight[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            eight[name.removesuffix("weight") + "scale_weight"] = scale
            sixteen[name] = (eight[name].float() * scale).bfloat16()
        else:
            eight[name] = sixteen[name] = tensor
    return eight, sixteen


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", LDM])
def test_the_marker_of_scaled_float8_may_stand_below_the_prefix(
    tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path, prefix: str
):
    eight, sixteen = scaled_float8(bfl)
    file = saved(below(prefix, eight), tmp_path / "eight.safetensors")
    reference = saved(sixteen, tmp_path / "sixteen.safetensors")
    found, expected = (open_source(path, base=tiny_flux) for path in (file, reference))
    assert source_digest(found) == source_digest(expected)
    assert "8-bit floats" in found.warnings[0]


def test_the_marker_may_be_there_twice_and_scales_have_64_bits(
    tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path
):
    eight, sixteen = scaled_float8(bfl)
    exact = {key: scale.double() if key.endswith("scale_weight") else scale for key, scale in eight.items()}
    file = saved({**below(LDM, exact), "scaled_fp8": EMPTY}, tmp_path / "eight.safetensors")
    found = open_source(file, base=tiny_flux)
    expected = open_source(saved(sixteen, tmp_path / "sixteen.safetensors"), base=tiny_flux)
    assert source_digest(found) == source_digest(expected)


@pytest.mark.parametrize("prefix", ["", LDM])
def test_a_marker_that_promises_scales_where_none_are_is_a_warning(
    tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path, prefix: str
):
    """ComfyUI reads such weights as they are. If their scales were lost, they are some hundred times too large."""
    eight = {key: value for key, value in scaled_float8(bfl)[0].items() if not key.endswith("scale_weight")}
    file = saved(below(prefix, eight), tmp_path / "lost.safetensors")
    matrices = sum(value.dtype == torch.float8_e4m3fn and value.ndim == 2 for value in eight.values())
    warnings = open_source(file, base=tiny_flux).warnings
    assert any(
        f"{matrices} of {matrices} matrices have none and are read as they are" in said for said in warnings
    )
    del eight["scaled_fp8"]
    (warning,) = open_source(saved(eight, tmp_path / "plain.safetensors"), base=tiny_flux).warnings
    assert "they have no scales" in warning


def test_a_layer_without_the_scale_that_the_marker_promises_is_named(
    tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path
):
    eight, _ = scaled_float8(bfl)
    del eight["img_in.scale_weight"]
    matrices = sum(key.endswith("scale_weight") for key in eight) + 1
    _, warning = open_source(saved(eight, tmp_path / "m.safetensors"), base=tiny_flux).warnings
    assert f"1 of {matrices} matrices have none and are read as they are: img_in.weight;" in warning


def test_two_scales_of_one_weight_are_an_error_that_names_both(
    tiny_flux: Path, bfl: dict[str, Tensor], tmp_path: Path
):
    eight, _ = scaled_float8(bfl)
    eight["img_in.weight_scale"] = eight["img_in.scale_weight"]
    with pytest.raises(InputError, match=r"img_in\.scale_weight and img_in\.weight_scale"):
        open_source(saved(eight, tmp_path / "m.safetensors"), base=tiny_flux)


def test_a_model_in_float64_is_rounded_to_float32(tiny_flux: Path, tmp_path: Path):
    double = {name: tensor.double() for name, tensor in weights_of(tiny_flux).items()}
    single = {name: tensor.float() for name, tensor in double.items()}
    found, expected = (
        open_source(saved(state, tmp_path / f"{name}.safetensors"), base=tiny_flux)
        for name, state in (("double", double), ("single", single))
    )
    assert source_digest(found) == source_digest(expected)
    entry = found.tensors["proj_out.weight"]
    assert torch.equal(entry.read_rows(1, 3), single["proj_out.weight"][1:3])


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("global_step", torch.tensor(875000)),
        ("position_ids", torch.arange(77)[None]),
        ("blocks.mask", torch.ones(4, 4, dtype=torch.bool)),
        ("epoch", torch.tensor([3], dtype=torch.int32)),
    ],
)
def test_whole_numbers_beside_the_weights_are_left_out_with_a_warning(
    tiny_flux: Path, tmp_path: Path, name: str, tensor: Tensor
):
    file = saved({**weights_of(tiny_flux), name: tensor}, tmp_path / "m.safetensors")
    assert same_model(file, tiny_flux)
    (warning,) = open_source(file, base=tiny_flux).warnings
    assert "integers next to the weights" in warning
    assert name in warning


# ------------------------------------------------------------------------------------------------- Qwen-Image-Edit 2511


@pytest.fixture(scope="module")
def qwen_edit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("qwen-image-edit", tmp_path_factory.mktemp("qwen") / "qwen")


def qwen_file(base: Path, prefix: str, out: Path) -> Path:
    (file,) = (base / "transformer").glob("*.safetensors")
    return saved(below(prefix, {**load_file(file), "__index_timestep_zero__": EMPTY}), out)


@pytest.mark.parametrize("prefix", ["", LDM])
def test_qwen_image_edit_2511_is_read_with_its_marker(qwen_edit: Path, tmp_path: Path, prefix: str):
    file = qwen_file(qwen_edit, prefix, tmp_path / "m.safetensors")
    assert same_model(file, qwen_edit)
    assert open_source(file, base=qwen_edit).warnings == ()


def test_the_marker_is_believed_where_the_base_is_an_older_one(qwen_edit: Path, tmp_path: Path):
    file = qwen_file(qwen_edit, LDM, tmp_path / "m.safetensors")
    older = tmp_path / "older"
    config = dict(read_json(qwen_edit / "transformer/config.json"))
    (older / "transformer").mkdir(parents=True)
    (older / "model_index.json").write_bytes((qwen_edit / "model_index.json").read_bytes())
    (older / "transformer/config.json").write_text(json.dumps({**config, "zero_cond_t": False}))
    source = open_source(file, base=older)
    assert source.config["zero_cond_t"] is True
    assert "__index_timestep_zero__ says zero_cond_t: True" in source.warnings[0]


# ------------------------------------------------------------------------------------------------- what a UNet predicts


@pytest.fixture(scope="module")
def v_prediction(ldm: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved({**ldm, **V_PREDICTION}, tmp_path_factory.mktemp("v") / "noob.safetensors")


def datafree(source: Path, base: Path | None, out: Path, *, single_file: bool = False) -> ConvertReport:
    outputs = [Output(format="nunchaku", path=str(out))] if single_file else []
    recipe = default_recipe(str(source), outputs=outputs)
    given = str(base) if base else None
    return convert(
        with_overrides(
            recipe, {"quantization.effort": "datafree", "quantization.rank": 16, "model.base": given}
        ),
        out,
    )


def test_v_prediction_changes_the_scheduler_that_is_written(sdxl: Path, v_prediction: Path, tmp_path: Path):
    report = datafree(v_prediction, sdxl, tmp_path / "out")
    before, after = (
        read_json(folder / "scheduler/scheduler_config.json") for folder in (sdxl, tmp_path / "out")
    )
    assert {key for key in after if after[key] != before.get(key)} == SETTINGS.keys()
    assert {key: after[key] for key in SETTINGS} == SETTINGS
    assert any("v_pred and ztsnr say" in warning for warning in report.warnings)
    assert check(tmp_path / "out", against=open_source(v_prediction, base=sdxl)).status == "ok"


@pytest.mark.parametrize("marker", ["module.", "", f"module.{LDM}"])
def test_what_lies_beside_a_model_is_wrapped_as_the_model_is(
    sdxl: Path, ldm: dict[str, Tensor], tmp_path: Path, marker: str
):
    file = saved({**below("module.", ldm), **below(marker, V_PREDICTION)}, tmp_path / "m.safetensors")
    source = open_source(file, base=sdxl)
    assert source.scheduler == {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert not any("also holds" in warning for warning in source.warnings)


def test_calibration_and_eval_generate_with_that_scheduler(sdxl: Path, v_prediction: Path):
    source = open_source(v_prediction, base=sdxl)
    pipe: Any = load_16bit_pipeline(source, class_name="UNet2DConditionModel", device=CPU)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.rescale_betas_zero_snr


def test_the_weights_are_those_of_the_folder_that_says_so_itself(
    sdxl: Path, v_prediction: Path, tmp_path: Path
):
    """And a single file says it in its header, whichever of the two it was made from."""
    folder = tmp_path / "folder"
    for file in (file for file in sdxl.rglob("*") if file.is_file()):
        (folder / file.relative_to(sdxl)).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.relative_to(sdxl)).write_bytes(file.read_bytes())
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **SETTINGS}))
    datafree(folder, None, tmp_path / "a.safetensors", single_file=True)
    datafree(v_prediction, sdxl, tmp_path / "b.safetensors", single_file=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    # drawn with a base that says otherwise
    pipe: Any = load_pipeline(tmp_path / "b.safetensors", base=sdxl, device="cpu")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    # a base that says it already is kept as it is, and there is nothing to warn of
    assert open_source(v_prediction, base=folder).warnings == ()
    datafree(v_prediction, folder, tmp_path / "out")
    assert (tmp_path / "out/scheduler/scheduler_config.json").read_bytes() == config.read_bytes()


def test_an_exported_file_sets_the_scheduler_of_the_base_that_it_is_given(
    sdxl: Path, v_prediction: Path, tmp_path: Path
):
    datafree(v_prediction, sdxl, tmp_path / "noob.safetensors", single_file=True)
    export(tmp_path / "noob.safetensors", "nunchaku-lite", tmp_path / "out", base=sdxl)
    assert read_json(tmp_path / "out/scheduler/scheduler_config.json").items() >= SETTINGS.items()
    export(tmp_path / "out", "nunchaku", tmp_path / "again.safetensors")
    assert open_checkpoint(tmp_path / "again.safetensors").source.scheduler == SETTINGS


@pytest.mark.parametrize(
    "settings",
    [
        {"_class_name": "os.system"},
        {"_class_name": "EDMEulerScheduler", "sigma_schedule": "none"},
        {"prediction_type": "v_prediction", "beta_schedule": "none"},
        {"prediction_type": "v_prediction", "num_train_timesteps": "many"},
    ],
)
def test_settings_that_no_scheduler_takes_are_an_error(sdxl: Path, settings: dict[str, object]):
    with pytest.raises(InputError) as caught:
        scheduler_with(sdxl, settings)
    assert "scheduler" in caught.value.message


def sd2(folder: Path, *, prediction: str, spread: float) -> tuple[Path, Path]:
    """A file of Stable Diffusion 2's layout, with biases of that spread near its output, and a base."""
    model = UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=1024
    )  # fmt: skip
    model.save_config(folder / "unet")
    EulerDiscreteScheduler(prediction_type=prediction).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}')
    state = dict(model.state_dict())
    state["up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"] = spread * torch.tensor([-1.0, 1.0] * 4)
    return saved(state, folder / "model.safetensors"), folder


@pytest.mark.parametrize(
    ("prediction", "spread", "looks"),
    [
        ("epsilon", 0.2, "predicts v (768 pixels)"),
        ("v_prediction", 0.02, "predicts epsilon (512 pixels)"),
        ("epsilon", 0.02, ""),
        ("v_prediction", 0.2, ""),
    ],
)
def test_stable_diffusion_2_that_looks_otherwise_than_its_base_is_said(
    tmp_path: Path, prediction: str, spread: float, looks: str
):
    """Its two kinds have the same shapes and no marker: nothing is changed on a guess."""
    file, base = sd2(tmp_path, prediction=prediction, spread=spread)
    source = open_source(file, base=base)
    assert source.scheduler == {}
    assert len(source.warnings) == bool(looks)
    assert all(looks in warning for warning in source.warnings)


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_the_header_of_a_file_may_say_it_too(sdxl: Path, ldm: dict[str, Tensor], tmp_path: Path, key: str):
    v, epsilon = (
        open_source(saved(ldm, tmp_path / f"{word}.safetensors", {key: word}), base=sdxl)
        for word in ("v", "epsilon")
    )
    assert (v.scheduler, epsilon.scheduler) == ({"prediction_type": "v_prediction"}, {})
    assert f"{key}=v says" in v.warnings[0]


def test_zero_terminal_snr_alone_says_nothing(sdxl: Path, ldm: dict[str, Tensor], tmp_path: Path):
    """As runtimes have it: a model that predicts noise can't draw from nothing but noise."""
    file = saved({**ldm, "ztsnr": EMPTY}, tmp_path / "m.safetensors")
    assert open_source(file, base=sdxl).scheduler == {}


def test_edm_v_prediction_gets_its_own_scheduler(sdxl: Path, ldm: dict[str, Tensor], tmp_path: Path):
    """CosXL: the range of noise stands in the file."""
    markers = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    file = saved({**ldm, **markers}, tmp_path / "cosxl.safetensors")
    datafree(file, sdxl, tmp_path / "out")
    scheduler: Any = EDMEulerScheduler.from_pretrained(tmp_path / "out/scheduler")
    assert (scheduler.config.sigma_max, scheduler.config.prediction_type) == (120.0, "v_prediction")
    assert scheduler.config.sigma_min == pytest.approx(0.002)
    assert read_json(tmp_path / "out/model_index.json")["scheduler"] == ["diffusers", "EDMEulerScheduler"]


def test_a_range_of_noise_that_is_none_is_an_error(sdxl: Path, ldm: dict[str, Tensor], tmp_path: Path):
    file = saved({**ldm, "edm_vpred.sigma_max": torch.tensor(torch.nan)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"edm_vpred\.sigma_max is not a positive number"):
        open_source(file, base=sdxl)


def test_playground_needs_its_own_pipeline(sdxl: Path, ldm: dict[str, Tensor], tmp_path: Path):
    edm = {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}
    file = saved({**ldm, **edm}, tmp_path / "playground.safetensors")
    with pytest.raises(InputError, match=r"Playground v2\.5") as caught:
        open_source(file, base=sdxl)
    assert caught.value.kind == "wrong-base"
    assert "playground-v2.5" in str(caught.value.hint)


def test_a_scheduler_without_such_settings_is_replaced_by_one_that_has_them(tmp_path: Path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(
        '{"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.013, "skip_prk_steps": true}'
    )
    found: Any = scheduler_with(tmp_path, SETTINGS)
    assert type(found) is EulerDiscreteScheduler
    assert (found.config["beta_end"], found.config["beta_schedule"]) == (0.013, "scaled_linear")
    assert float(found.alphas_cumprod[-1]) < 1e-6
    plain = scheduler_with(tmp_path, {"prediction_type": "v_prediction"})
    assert type(plain).__name__ == "PNDMScheduler"


def test_with_zero_terminal_snr_drawing_starts_at_the_last_step(tmp_path: Path):
    DDIMScheduler(timestep_spacing="leading", steps_offset=1).save_pretrained(tmp_path / "scheduler")
    found: Any = scheduler_with(tmp_path, SETTINGS)
    found.set_timesteps(10)
    assert int(found.timesteps[0]) == 999
