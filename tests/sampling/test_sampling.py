"""How a model is sampled by default: sizes, steps and guidance, read from its files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import svdq_cli
from svdq_cli.entrypoints.init import write_recipe
from svdq_cli.errors import InputError
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import Calibration, default_recipe, load_recipe
from svdq_cli.sampling import SAMPLING_FILE, ModelSampling, sampling_of
from svdq_cli.source import Source
from svdq_cli.storage.resources import data_root, demo_model_folder

UNET = "UNet2DConditionModel"
EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0}
KL = {"block_out_channels": [128, 256, 512, 512], "sample_size": 1024}

Make = Callable[..., Source]


@pytest.fixture
def model(tmp_path: Path) -> Make:
    """A pipeline's configs, without weights."""

    def make(
        pipeline: str,
        config: Mapping[str, object],
        *,
        scheduler: Mapping[str, object] = FLOW,
        vae: Mapping[str, object] = KL,
        index: Mapping[str, object] | None = None,
        name: str = "model",
    ) -> Source:
        folder = tmp_path / name
        files = {
            "model_index.json": {"_class_name": pipeline, **(index or {})},
            "scheduler/scheduler_config.json": scheduler,
            "vae/config.json": vae,
        }
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(content))
        component = "unet" if config.get("_class_name") == UNET else "transformer"
        return Source(folder, folder, component, config, {})

    return make


def figures(found: ModelSampling) -> tuple[int, int, float | None, float | None]:
    return found.width, found.steps, found.guidance, found.true_cfg


FLUX_DEV = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
FLUX_BARE = {**FLUX_DEV, "guidance_embeds": False}
SDXL = {"_class_name": UNET, "sample_size": 128, "addition_embed_type": "text_time"}
QWEN = {"_class_name": "QwenImageTransformer2DModel"}
QWEN_FLOW = {**FLOW, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
Z_IMAGE = {"_class_name": "ZImageTransformer2DModel"}
STILL = {**FLOW, "use_dynamic_shifting": False}
SANA = {"_class_name": "SanaTransformer2DModel", "sample_size": 32}
DC = {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}


@pytest.mark.parametrize(
    ("pipeline", "config", "given", "expected"),
    [
        # (width, steps, guidance, true_cfg)
        pytest.param("FluxPipeline", FLUX_DEV, {}, (1024, 20, 3.5, 1.0), id="FLUX.1-dev"),
        pytest.param("FluxFillPipeline", FLUX_DEV, {}, (1024, 20, 30.0, None), id="FLUX.1-Fill-dev"),
        pytest.param(
            "FluxPipeline",
            FLUX_BARE,
            {"scheduler": {**STILL, "shift": 1.0}},
            (1024, 4, 0.0, 1.0),
            id="schnell",
        ),
        pytest.param(
            "FluxPipeline", FLUX_BARE, {}, (1024, 20, 3.5, 1.0), id="a schnell that was undistilled"
        ),
        pytest.param(
            "Flux2KleinPipeline",
            {"_class_name": "Flux2Transformer2DModel"},
            {"index": {"is_distilled": True}},
            (1024, 4, 1.0, None),
            id="FLUX.2-klein-4B",
        ),
        pytest.param(
            "StableDiffusionXLPipeline", SDXL, {"scheduler": EULER}, (1024, 20, 5.0, None), id="SDXL"
        ),
        pytest.param(
            "StableDiffusionXLPipeline",
            {**SDXL, "sample_size": 64},
            {"scheduler": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}},
            (512, 4, 0.0, None),
            id="SDXL-Turbo",
        ),
        pytest.param(
            "StableDiffusionXLPipeline",
            SDXL,
            {"scheduler": {**EULER, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}},
            (1024, 20, 5.0, None),
            id="SDXL of zero terminal SNR",
        ),
        pytest.param(
            "StableDiffusionXLPipeline",
            {**SDXL, "time_cond_proj_dim": 256},
            {"scheduler": {"_class_name": "LCMScheduler"}},
            (1024, 4, 8.0, None),
            id="LCM-SDXL",
        ),
        pytest.param(
            "StableDiffusionPipeline",
            {"_class_name": UNET, "sample_size": 64},
            {"scheduler": {"_class_name": "LCMScheduler"}, "vae": {**KL, "sample_size": 512}},
            (512, 4, 1.0, None),
            id="SD 1.5 with an LCM LoRA",
        ),
        pytest.param(
            "StableDiffusionXLPipeline",
            SDXL,
            {"scheduler": EULER, "name": "SDXL-Lightning-8step"},
            (1024, 8, 0.0, None),
            id="by name",
        ),
        pytest.param(
            "ZImagePipeline", Z_IMAGE, {"scheduler": STILL}, (1024, 9, 0.0, None), id="Z-Image-Turbo"
        ),
        pytest.param(
            "ZImagePipeline",
            Z_IMAGE,
            {"scheduler": {**STILL, "shift": 6.0}},
            (1024, 20, 5.0, None),
            id="Z-Image",
        ),
        pytest.param(
            "QwenImagePipeline", QWEN, {"scheduler": QWEN_FLOW}, (1024, 20, None, 4.0), id="Qwen-Image"
        ),
        pytest.param(
            "QwenImagePipeline",
            QWEN,
            {"scheduler": {**FLOW, "base_shift": 1.0986, "max_shift": 1.0986}},
            (1024, 8, None, 1.0),
            id="Qwen-Image-Lightning",
        ),
        pytest.param("SanaPipeline", SANA, {"vae": DC}, (1024, 20, 4.5, None), id="SANA 1024"),
        pytest.param(
            "SanaSprintPipeline",
            {**SANA, "sample_size": 16},
            {"vae": DC, "scheduler": {"_class_name": "SCMScheduler"}},
            (512, 2, 4.5, None),
            id="SANA-Sprint",
        ),
        pytest.param(
            "PixArtSigmaPipeline",
            {"_class_name": "PixArtTransformer2DModel", "sample_size": 64},
            {},
            (512, 20, 4.5, None),
            id="PixArt-Sigma 512 with SDXL's autoencoder",
        ),
        pytest.param("NoSuchPipeline", {"_class_name": "NewModel"}, {}, (1024, 20, None, None), id="unknown"),
    ],
)
def test_the_models_that_people_have_are_sampled_as_their_makers_do(
    model: Make, pipeline: str, config: Mapping[str, object], given: dict[str, object], expected: object
):
    found = sampling_of(model(pipeline, config, **given))
    assert figures(found) == expected
    assert found.basis


@pytest.mark.parametrize(
    ("lora", "steps", "guidance"),
    [
        ("Hyper-FLUX.1-dev-8steps-lora.safetensors", 8, 3.5),
        ("FLUX.1-Turbo-Alpha.safetensors", 4, 3.5),
        ("style.safetensors", 20, 3.5),
    ],
)
def test_a_merged_lora_that_distills_takes_few_steps_and_keeps_the_guidance_input(
    model: Make, lora: str, steps: int, guidance: float
):
    found = sampling_of(model("FluxPipeline", FLUX_DEV), loras=[f"/loras/turbo/{lora}"])
    assert (found.steps, found.guidance) == (steps, guidance)


@pytest.mark.parametrize("name", ["flux-dev-de-distill", "zimage-deturbo", "turbonator", "hyperion"])
def test_a_name_that_only_looks_distilled_is_not(model: Make, name: str):
    assert not sampling_of(model("FluxPipeline", FLUX_DEV, name=name)).differs


def test_the_shipped_recipes_of_the_embedded_model_say_what_its_file_says():
    folder = demo_model_folder()
    own = sampling_of(Source(folder, folder, "transformer", {}, {}))
    wanted = load_recipe(data_root("configs") / "demo-int4.yaml").calibration
    assert wanted is not None
    for name in (
        "prompts",
        "samples",
        "steps",
        "guidance",
        "height",
        "width",
        "max_sequence_length",
        "batch_size",
    ):
        assert getattr(own, name) == getattr(wanted, name), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 16, "guidance": 0, "prompts": "/etc/passwd"},
        {"steps": 16, "guidance": 0, "prompts": "calib_prompts/../../secret.txt"},
        {"steps": 10**9, "guidance": 0},
        {"steps": 16, "guidance": float("inf")},
        {"steps": 16, "guidance": 0, "height": 1 << 30},
        {"steps": 16, "guidance": 0, "code": "import os"},
        {"guidance": 0},
    ],
)
def test_a_sampling_file_out_of_bounds_is_refused_by_its_name(model: Make, wrong: dict[str, object]):
    source = model("FluxPipeline", FLUX_DEV)
    (source.path / SAMPLING_FILE).write_text(json.dumps({"schema": 1, **wrong}))
    with pytest.raises(InputError, match=SAMPLING_FILE):
        sampling_of(source)


def test_an_exported_embedded_model_gets_a_recipe_that_it_can_be_sampled_with(tmp_path: Path):
    from svdq_cli.entrypoints.demo import export_model

    export_model(tmp_path / "my-model", outliers=False, overwrite=False)
    write_recipe(str(tmp_path / "my-model"), tmp_path / "recipe.yaml", {}, overwrite=False)
    wanted = load_recipe(tmp_path / "recipe.yaml").calibration
    assert wanted is not None
    assert (wanted.height, wanted.width, wanted.steps, wanted.guidance, wanted.batch_size) == (
        96,
        96,
        16,
        0,
        16,
    )
    assert wanted.prompts == "calib_prompts/demo_calibration.txt"


def test_what_a_recipe_says_wins_over_the_model_s_own():
    recipe = default_recipe("demo", calibration=Calibration(steps=3, width=64))
    prepared = prepare(recipe)
    assert prepared.sampling is not None
    settings = prepared.sampling.settings
    assert (settings.steps, settings.width, settings.height, settings.guidance) == (3, 64, 96, 0)
    filled = prepared.recipe.calibration
    assert filled is not None
    assert (filled.samples, filled.prompts) == (32, "calib_prompts/demo_calibration.txt")


def test_images_that_the_pipeline_reads_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import svdq_cli.prepare.sampling
    from svdq_cli.conversion.plan import predict

    (tmp_path / "one.png").write_bytes(b"png")
    asked: list[Path] = []
    real = svdq_cli.prepare.sampling.image_files
    monkeypatch.setattr(
        svdq_cli.prepare.sampling, "image_files", lambda path: asked.append(path) or real(path)
    )
    predict(default_recipe("demo", calibration=Calibration(image=str(tmp_path), samples=2, steps=2)))
    assert asked == [tmp_path]


def test_a_loaded_pipeline_without_arguments_samples_as_its_model_wants(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    """And `help` says with what; arguments that are given win."""
    import shutil

    folder = tmp_path / "lite"
    shutil.copytree(converted_flux("int4") / "lite", folder)
    said = {"schema": 1, "height": 16, "width": 32, "steps": 3, "guidance": 0, "max_sequence_length": 16}
    (folder / SAMPLING_FILE).write_text(json.dumps(said))
    pipe = svdq_cli.load_pipeline(folder, device="cpu")
    steps: list[int] = []

    def count(pipe: object, step: int, timestep: object, tensors: dict[str, object]) -> dict[str, object]:
        steps.append(step)
        return tensors

    call = type(pipe).__call__
    (image,) = call(pipe, "a circle", callback_on_step_end=count).images
    assert (image.size, steps) == ((32, 16), [0, 1, 2])
    assert call(pipe, "a circle", num_inference_steps=1, width=16).images[0].size == (16, 16)
    defaults = {name: given.default for name, given in inspect.signature(call).parameters.items()}
    assert (defaults["height"], defaults["num_inference_steps"], defaults["max_sequence_length"]) == (
        16,
        3,
        16,
    )
    assert type(pipe).__name__ == "FluxPipeline"
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / SAMPLING_FILE).read_text()) == said


@pytest.mark.parametrize(
    ("pipeline", "config", "expected"),
    [
        # (width, height, frames, fps)
        ("WanPipeline", {"_class_name": "WanTransformer3DModel"}, (832, 480, 81, 16)),
        ("LTXPipeline", {"_class_name": "LTXVideoTransformer3DModel"}, (704, 512, 161, 25)),
        ("LTX2Pipeline", {"_class_name": "LTX2VideoTransformer3DModel"}, (768, 512, 121, 24)),
        ("FluxPipeline", FLUX_DEV, (1024, 1024, None, None)),
    ],
)
def test_a_video_has_the_size_length_and_rate_of_its_class(
    model: Make, pipeline: str, config: dict[str, object], expected: tuple[int | None, ...]
):
    found = sampling_of(model(pipeline, config, vae={}))
    assert (found.width, found.height, found.frames, found.fps) == expected
