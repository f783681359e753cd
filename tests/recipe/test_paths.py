"""Where the files that a recipe names are looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdq_cli.errors import InputError
from svdq_cli.recipe import find_prompts, find_source
from svdq_cli.storage.resources import data_root

LIST = "calib_prompts/general.txt"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An empty current directory and an empty recipe folder."""
    here, beside = tmp_path / "here", tmp_path / "recipes"
    here.mkdir()
    beside.mkdir()
    monkeypatch.chdir(here)
    return here, beside


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a small red circle on white\n")
    return path


def test_prompts_are_looked_for_here_then_beside_the_recipe_then_in_what_ships(places: tuple[Path, Path]):
    here, beside = places
    assert find_prompts(LIST, beside).samefile(data_root("calib_prompts") / "general.txt")
    assert find_prompts(LIST, None).samefile(data_root("calib_prompts") / "general.txt")
    near = write(beside / LIST)
    assert find_prompts(LIST, beside).samefile(near)
    nearest = write(here / LIST)
    assert find_prompts(LIST, beside).samefile(nearest)


def test_missing_prompts_are_a_missing_input_that_names_every_place(places: tuple[Path, Path]):
    _, beside = places
    with pytest.raises(InputError) as caught:
        find_prompts("calib_prompts/none.txt", beside)
    error = caught.value
    assert (error.code, error.kind, error.where) == (3, "not-found", "calib_prompts/none.txt")
    for place in (Path("calib_prompts"), beside / "calib_prompts", data_root("calib_prompts")):
        assert str(place / "none.txt") in error.message
    assert "calib_prompts/general.txt" in (error.hint or "")


def test_a_folder_of_captions_is_found_too(places: tuple[Path, Path]):
    assert find_prompts(str(places[1]), None) == places[1]


def test_an_absolute_path_is_looked_for_only_there(places: tuple[Path, Path]):
    here, beside = places
    listed = write(here / "p.txt")
    assert find_prompts(listed, beside) == listed
    with pytest.raises(InputError):
        find_prompts(here / "none.txt", beside)


def test_a_source_beside_the_recipe_is_found_and_a_hub_id_is_left_alone(places: tuple[Path, Path]):
    _, beside = places
    (beside / "models" / "tiny").mkdir(parents=True)
    assert find_source("models/tiny", beside) == str(beside / "models" / "tiny")
    assert find_source("black-forest-labs/FLUX.1-dev", beside) == "black-forest-labs/FLUX.1-dev"
