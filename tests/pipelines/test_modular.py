"""Pipelines of Modular Diffusers (`modular_model_index.json`): calibrated, converted, loaded, and they draw."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.entrypoints.push import _content
from svdq_cli.errors import InputError
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pipelines.generate import generate_images, load_source_pipeline
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.sampling import sampling_of
from svdq_cli.source import open_source, pipeline_index
from tests.families.test_pipelines import recipe_for
from tests.tiny_families import tiny_pipeline

INDEX = "modular_model_index.json"


def modular(name: str, folder: Path) -> Path:
    """The tiny pipeline of that name as a modular one."""
    plain = tiny_pipeline(name, folder / "plain")
    pipe: Any = diffusers.ModularPipeline.from_pretrained(str(plain))
    pipe.load_components(dtype=torch.bfloat16)
    pipe.save_pretrained(str(folder / "modular"), overwrite_modular_index=True)
    return folder / "modular"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return modular("qwen-image", tmp_path_factory.mktemp("modular"))


@pytest.fixture(scope="module")
def converted(folder: Path) -> Path:
    out = folder.parent / "out"
    assert convert(recipe_for(folder), out, options=RunOptions(device="cpu")).layer_sqnr_db.min > 10
    return out


def test_a_calibrated_conversion_is_sound_and_draws(folder: Path, converted: Path):
    assert check(converted, against=open_source(folder)).status == "ok"
    pipe: Any = load_pipeline(converted, device="cpu")
    assert diffusers.QwenImageModularPipeline in type(pipe).__mro__
    settings = sampling_for(recipe_for(folder), open_source(folder)).settings
    (image,) = generate_images(pipe, ["a red circle"], settings=settings)
    assert len(image.getcolors(maxcolors=32 * 32) or ()) > 1
    # and as the library's own users call it
    (other,) = pipe(prompt="a red circle", height=32, width=32, num_inference_steps=2, output="images")
    assert other.size == (32, 32)


def test_several_prompts_in_one_call_have_as_many_negative_prompts(folder: Path, converted: Path):
    pipe: Any = load_pipeline(converted, device="cpu")
    settings = sampling_for(recipe_for(folder), open_source(folder)).settings
    assert len(generate_images(pipe, ["a red circle", "two blue squares"], settings=settings)) == 2


def test_the_output_is_a_modular_folder_whose_components_are_its_own(folder: Path, converted: Path):
    index = json.loads((converted / INDEX).read_text())
    assert index["_class_name"] == "QwenImageModularPipeline"
    # left as it was, the library would load the 16-bit transformer from where the source came from
    assert index["transformer"][2]["pretrained_model_name_or_path"] is None
    assert str(folder) not in (converted / INDEX).read_text()
    pushed = json.loads(_content(converted / INDEX, "me/mine"))
    assert pushed["transformer"][2]["pretrained_model_name_or_path"] == "me/mine"
    assert pushed["controlnet"] == index["controlnet"]  # there is none


def test_the_library_finds_the_parts_of_the_output(converted: Path):
    pipe = diffusers.ModularPipeline.from_pretrained(str(converted))
    assert pipe.get_component_spec("transformer").pretrained_model_name_or_path == str(converted)


def test_it_is_sampled_as_its_blocks_say(folder: Path):
    assert sampling_of(open_source(folder)).steps == 20  # 50, of which calibration takes no more than 20
    assert pipeline_index(folder)["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]


def test_code_and_classes_from_elsewhere_are_refused(folder: Path, tmp_path: Path):
    index = json.loads((folder / INDEX).read_text())
    for changed, said in (
        ({"vae": ["custom_code", "Vae", index["vae"][2]]}, "comes from 'custom_code'"),
        ({"_class_name": "StableDiffusionPipeline"}, "is not a pipeline of diffusers"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({**index, **changed}))
        given = {name: None for name in ("transformer", "text_encoder", "tokenizer", "scheduler")}
        with pytest.raises(InputError, match=said):
            load_source_pipeline(tmp_path, dtype=torch.float32, components=given)


def test_blocks_from_the_folder_are_not_run(folder: Path, tmp_path: Path):
    """Custom blocks are named by `auto_map` of a config.json, which is not read."""
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "block.Mine"}}))
    (tmp_path / "block.py").write_text("raise SystemExit('run')")
    assert load_source_pipeline(tmp_path, dtype=torch.float32) is not None


def test_an_error_in_a_block_is_raised_and_not_printed_by_the_library_too(folder: Path):
    """The library writes a traceback for each block around the one that failed."""
    pipe: Any = load_source_pipeline(folder, dtype=torch.float32)
    pipe.vae.register_to_config(latents_mean=[0.0])
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    handler.setLevel(logging.ERROR)
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        settings = sampling_for(recipe_for(folder), open_source(folder)).settings
        with pytest.raises(RuntimeError, match="is invalid for input of size 1"):
            generate_images(pipe, ["a red circle"], settings=settings)
        assert not printed.getvalue()
        logging.getLogger("diffusers.modular_pipelines.modular_pipeline").error("Error in block: of another")
        assert printed.getvalue(), "the library's own words are back after the call"
    finally:
        logger.removeHandler(handler)
