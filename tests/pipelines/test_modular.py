"""Pipelines of Modular Diffusers (`modular_model_index.json`): calibrated, converted, loaded, and they draw."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
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
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.load import load_source_pipeline
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
    card = _content(converted / "README.md", "me/mine")
    assert isinstance(card, bytes)
    assert card.count(b'ModularPipeline.from_pretrained("me/mine")') == 1
    pushed = json.loads(_content(converted / INDEX, "me/mine"))
    assert pushed["transformer"][2]["pretrained_model_name_or_path"] == "me/mine"
    assert pushed["controlnet"] == index["controlnet"]  # there is none


def test_the_library_finds_the_parts_of_the_output(converted: Path):
    pipe = diffusers.ModularPipeline.from_pretrained(str(converted))
    assert pipe.get_component_spec("transformer").pretrained_model_name_or_path == str(converted)


_AS_THE_CARD_SAYS = """
import json, os, sys
os.environ["DIFFUSERS_TRUST_REMOTE_KERNELS"] = "true"  # the stand-in comes from the tests, not from the Hub
from diffusers import ModularPipeline  # before the stand-in, which looks like no installed package
from tests.formats import standin_kernels
standin_kernels.install()
from diffusers.quantizers.nunchaku.nunchaku_quantizer import NunchakuLiteQuantizer
NunchakuLiteQuantizer.validate_environment = lambda *_, **__: None  # it wants a CUDA device
os.chdir(sys.argv[1])
code = open("README.md").read().split("```python\\n")[1].split("```")[0]
names = {}
exec(code, names)
pipe = names["pipe"]
settings = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}
(image,) = pipe(prompt="a red circle", **settings, output="images")
kinds = {type(module).__name__ for module in pipe.transformer.modules()}
print(json.dumps([type(pipe).__name__, image.size, sorted(kinds)]))
"""


def test_diffusers_own_loader_reads_the_output_as_its_model_card_says(converted: Path):
    """In a process of its own, because the package called `kernels`, once it is seen, stays seen."""
    run = subprocess.run(
        [sys.executable, "-c", _AS_THE_CARD_SAYS, str(converted)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    name, size, kinds = json.loads(run.stdout.splitlines()[-1])
    assert (name, size) == ("QwenImageModularPipeline", [32, 32])
    assert {"SVDQW4A4Linear", "AWQW4A16Linear"} <= {*kinds}


@pytest.fixture
def spread(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pipeline as an index alone, whose components are in another folder."""
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path / "cache"))
    index = json.loads((folder / INDEX).read_text())
    for name, value in index.items():
        if isinstance(value, list) and (folder / name).is_dir():
            place = {"pretrained_model_name_or_path": str(folder), "subfolder": name}
            index[name] = [None, None, {**value[2], **place}]
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / INDEX).write_text(json.dumps(index))
    return tmp_path / "index"


def test_components_of_other_folders_are_in_the_output(folder: Path, spread: Path, tmp_path: Path):
    recipe = recipe_for(spread)
    datafree = recipe.quantization.model_copy(update={"effort": "datafree", "smoothing": "none"})
    recipe = recipe.model_copy(update={"quantization": datafree, "calibration": None})
    out = tmp_path / "out"
    assert convert(recipe, out, options=RunOptions(device="cpu")).status == "ok"
    assert check(out, against=open_source(folder)).status == "ok"
    assert str(folder) not in (out / INDEX).read_text()
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    settings = sampling_for(recipe_for(folder), open_source(folder)).settings
    assert generate_images(load_pipeline(out, device="cpu"), ["a red circle"], settings=settings)


def test_a_missing_component_is_named(converted: Path, tmp_path: Path):
    for part in converted.iterdir():
        if part.name != "vae":
            (tmp_path / part.name).symlink_to(part)
    with pytest.raises(InputError, match="component 'vae' is missing"):
        load_pipeline(tmp_path, device="cpu")


def test_it_is_sampled_as_its_blocks_say(folder: Path):
    assert sampling_of(open_source(folder)).steps == 20  # 50, of which calibration takes no more than 20
    assert pipeline_index(folder)["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]


def test_code_and_classes_from_elsewhere_are_refused(folder: Path, tmp_path: Path):
    index = json.loads((folder / INDEX).read_text())
    for changed, said in (
        ({"vae": ["custom_code", "Vae", index["vae"][2]]}, "comes from 'custom_code'"),
        # what the library would import
        (
            {"vae": [*index["vae"][:2], {**index["vae"][2], "type_hint": ["custom_code", "Vae"]}]},
            "comes from 'custom_code'",
        ),
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
