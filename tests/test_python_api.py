"""The package's functions: what the page on them and the examples show runs, and reports say what the commands say."""

from __future__ import annotations

import inspect
import pkgutil
import re
import shutil
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import svdq_cli
from svdq_cli.cli import options as opt
from svdq_cli.errors import InputError, UsageError
from svdq_cli.recipe import Calibration, Quantization, default_recipe
from svdq_cli.records import Event
from svdq_cli.storage.resources import demo_lora_file
from tools.train_demo.judge import look

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/python-api.md"
FUNCTIONS = [name for name in svdq_cli.__all__ if inspect.isfunction(getattr(svdq_cli, name))]


def example(name: str) -> ModuleType:
    """One of examples/, as a module; the folder is no package."""
    spec = import_module("importlib.util").spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = import_module("importlib.util").module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pink(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's LoRA as a file in a folder."""
    return Path(shutil.copy(demo_lora_file(), tmp_path_factory.mktemp("lora") / "style.safetensors"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, pink: Path) -> dict[str, Any]:
    """The names that are left when all code of the page was run, block after block, in an empty folder."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copy(pink, folder)
    names: dict[str, Any] = {"__name__": "page", "folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
            exec(code, names)
    return names


def test_no_public_name_is_that_of_a_room_or_module():
    """`import svdq_cli.NAME.x` would put the module in the function's place."""
    assert not {module.name for module in pkgutil.iter_modules(svdq_cli.__path__)} & set(svdq_cli.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_does_and_is_on_the_page(name: str):
    assert (getattr(svdq_cli, name).__doc__ or "").strip()
    assert re.search(rf"\b{name}\(", PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", ["convert", "calibrate", "evaluate"])
def test_a_function_takes_all_sampling_options_of_its_command(command: str):
    named = "eval" if command == "evaluate" else command
    options = [each for found in vars(opt).values() for each in getattr(found, "__metadata__", ())]
    keys = {key for each in options if isinstance(each, opt.Sets) and named in each.on for key in each.keys}
    wanted = {key.split(".")[-1] for key in keys if key.startswith("calibration.")} - {"column"}
    assert {"frames", "fps", "width"} <= wanted
    assert wanted <= set(inspect.signature(getattr(svdq_cli, command)).parameters)


def test_the_code_of_the_page_runs_and_makes_what_it_says(page: dict[str, Any]):
    made = {path.name for path in page["folder"].iterdir()}
    assert {
        "demo-int4",
        "demo-nvfp4",
        "demo-int4.safetensors",
        "demo-int4-style",
    } <= made
    assert page["figures"].images == 2
    assert page["image"].size == (96, 96)
    assert page["recipe"].quantization.rank == 16


def test_a_recipe_object_and_a_recipe_file_make_the_same_checkpoint(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(
        f"version: 1\nmodel: {{source: {tiny_flux}}}\nquantization: {{effort: datafree, rank: 16}}\n"
    )
    recipe = default_recipe(str(tiny_flux), quantization=Quantization(effort="datafree", rank=16))
    from_file = svdq_cli.convert("tiny.yaml", "a")
    from_object = svdq_cli.convert(recipe, "b")
    assert from_file.outputs[0].sha256 == from_object.outputs[0].sha256


def test_options_win_over_a_recipe_and_events_reach_the_caller(tiny_flux: Path, tmp_path: Path):
    seen: list[Event] = []
    recipe = default_recipe(str(tiny_flux), quantization=Quantization(effort="datafree", rank=16))
    report = svdq_cli.convert(
        recipe, tmp_path / "out", precision="nvfp4", rank=32, max_ram="64GiB", on_event=seen.append
    )
    assert (report.precision, report.rank.requested) == ("nvfp4", 32)
    assert {"solve", "pack", "check"} <= {event.stage for event in seen}


def test_what_is_wrong_is_raised_in_the_commands_words(tiny_flux: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no-such-model") as missing:
        svdq_cli.convert("no-such-model", tmp_path / "out")
    assert (missing.value.kind, missing.value.code) == ("not-found", 3)
    with pytest.raises(UsageError, match="not a size"):
        svdq_cli.convert(tiny_flux, tmp_path / "out", max_ram="much")
    with pytest.raises(UsageError, match="multiple of 16"):
        svdq_cli.convert(tiny_flux, tmp_path / "out", rank=17)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_checked_against_its_own_model_only(converted_flux: Any, tiny_flux: Path):
    assert svdq_cli.check(converted_flux("int4") / "lite", against=tiny_flux).status == "ok"
    recipe = default_recipe("demo", calibration=Calibration())
    with pytest.raises(InputError) as other:
        svdq_cli.check(converted_flux("int4") / "lite", against=recipe)
    assert (other.value.kind, other.value.code) == ("shape-mismatch", 3)


def test_the_examples_run(tmp_path: Path, pink: Path, capsys: pytest.CaptureFixture[str]):
    example("convert").main(tmp_path)
    example("fold_lora").main(tmp_path, tmp_path / "int4", pink)
    with Image.open(tmp_path / "image.png") as image:
        background, objects = look(image)
    assert (background, [(each.color, each.shape) for each in objects]) == ("white", [("red", "circle")])
    with Image.open(tmp_path / "folded.png") as folded, Image.open(tmp_path / "strength-0.8.png") as switched:
        assert (folded.size, switched.size) == ((96, 96), (96, 96))
    assert "times smaller" in capsys.readouterr().out


def test_the_calibration_example_compares_both_precisions(
    tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]
):
    example("calibrate_once").main(tmp_path, str(tiny_flux), samples=2, steps=1)
    assert re.findall(r"^(int4|nvfp4): PSNR", capsys.readouterr().out, re.MULTILINE) == ["int4", "nvfp4"]


def test_the_examples_recipe_converts_and_holds_its_gate(tmp_path: Path):
    report = svdq_cli.convert(ROOT / "examples/recipe.yaml", tmp_path / "out", samples=2, steps=1)
    assert report.status == "ok"
    assert report.recipe["gates"] == {"size_ratio": ">= 2"}
    kept = "transformer_blocks.0.ff_context.net.2"
    assert kept not in report.layer_sqnr_db.per_layer
