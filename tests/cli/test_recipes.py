"""Recipes that ship with svdq are listed, used by their names from anywhere, and copied to be changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svdq_cli.cli import run
from svdq_cli.prepare.from_command_line import recipe_file, recipe_of
from svdq_cli.recipe import load_recipe, shipped_recipes
from svdq_cli.storage.resources import data_root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_shipped_recipe_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]):
    assert run(["recipes", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [recipe["name"] for recipe in report["recipes"]]
    assert names == sorted(file.stem for file in data_root("configs").glob("*.yaml"))
    assert all(recipe["about"] for recipe in report["recipes"])
    assert run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("flux1-kontext-dev-nvfp4 ") for line in lines)


@pytest.mark.parametrize("name", ["flux1-dev-int4", "configs/flux1-dev-int4.yaml", "configs/flux1-dev-int4"])
def test_a_recipe_is_found_by_its_name_from_anywhere(name: str):
    recipe, beside = recipe_of(name)
    assert recipe.model.source == "black-forest-labs/FLUX.1-dev"
    assert beside == data_root("configs")


def test_what_lies_here_under_the_name_goes_before():
    Path("demo-int4").mkdir()
    assert recipe_file("demo-int4") is None
    assert recipe_file("nobody/demo-int4") is None
    assert recipe_file("mine.yaml") == Path("mine.yaml")


def test_a_shipped_recipe_converts_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["convert", "demo-int4", "-o", "out", "--effort", "datafree", "--rank", "16", "--device", "cpu"]
    assert run([*words, "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["class"] == "FluxTransformer2DModel"
    assert (tmp_path / "out/model_index.json").is_file()


def test_a_shipped_recipe_is_copied_to_be_changed(capsys: pytest.CaptureFixture[str]):
    assert run(["init", "flux1-dev-int4", "-o", "mine.yaml", "-q"]) == 0
    assert load_recipe("mine.yaml") == load_recipe(data_root("configs") / "flux1-dev-int4.yaml")
    assert run(["init", "flux1-dev-int4", "-o", "other.yaml", "--rank", "64"]) == 2
    assert "already a recipe" in capsys.readouterr().err


def test_an_editor_finds_the_schema_of_every_recipe_that_init_writes(tiny_flux: Path):
    for source in (str(tiny_flux), "flux1-dev-int4"):
        assert run(["init", source, "-o", "mine.yaml", "--overwrite", "-q"]) == 0
        first = Path("mine.yaml").read_text(encoding="utf-8").splitlines()[0]
        address = first.removeprefix("# yaml-language-server: $schema=file://")
        assert json.loads(Path(address).read_text(encoding="utf-8"))["title"] == "svdq recipe, version 1"


def test_every_shipped_recipe_has_its_schema_line():
    for recipe in shipped_recipes():
        assert recipe.path.read_text(encoding="utf-8").startswith(
            "# yaml-language-server: $schema=recipe.schema.json"
        )


def test_a_mistyped_name_is_answered_with_the_recipe_that_it_is_close_to(capsys: pytest.CaptureFixture[str]):
    assert run(["convert", "flux1-dev-in4", "--plan"]) == 3
    assert "did you mean the recipe flux1-dev-int4?" in capsys.readouterr().err
