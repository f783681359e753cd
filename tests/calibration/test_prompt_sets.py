"""Prompt sets by name, from local files of the shapes that lie on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svdq_cli.calibration.prompt_sets import find_prompt_set, prompts_by_image, prompts_of_set
from svdq_cli.errors import InputError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prompts import chosen_prompts
from svdq_cli.recipe import Calibration, DatasetPrompts, default_recipe
from svdq_cli.records import ignore_events


def test_a_set_of_prompts_with_categories_is_read_in_its_order(tmp_path: Path):
    path = tmp_path / "meta_data.json"
    entries = {
        "b7": {"category": "animals", "prompt": " a cat,\n sitting "},
        "a3": {"category": "art", "prompt": "«a dog»"},
    }
    path.write_text(json.dumps(entries), encoding="utf-8")
    assert prompts_by_image(path) == ("a cat, sitting", "«a dog»")


def test_a_set_of_prompts_in_yaml_is_read_in_its_order(write_text: Callable[[str, str], Path]):
    path = write_text("sDCI.yaml", "sa_2: 'two: dogs'\nsa_1: one cat\n  on a mat\n")
    assert prompts_by_image(path) == ("two: dogs", "one cat on a mat")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.json", "{", "not a list of prompts"),
        ("a.json", "[]", "expected prompts by image"),
        ("a.json", '{"x": {"category": "art"}}', "no prompt for 'x'"),
        ("a.json", '{"x": 3}', "no prompt for 'x'"),
        ("a.yaml", "x: [", "not a list of prompts"),
        ("a.yaml", "!!python/object/apply:os.system ['false']", "not a list of prompts"),
    ],
)
def test_other_content_is_refused(write_text: Callable[[str, str], Path], name: str, content: str, what: str):
    with pytest.raises(InputError, match=what) as caught:
        prompts_by_image(write_text(name, content))
    assert caught.value.hint


@pytest.mark.parametrize("name", ["MJHQ-30K", "mjhq-30k", "sDCI", "PartiPrompts"])
def test_sets_are_known_by_name_and_a_file_of_that_name_goes_before(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert find_prompt_set(name) is not None
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("a local prompt\n")
    assert find_prompt_set(name) is None
    recipe = default_recipe("demo", calibration=Calibration(prompts=name, samples=1))
    assert chosen_prompts(recipe, RunOptions(), ignore_events).texts == ("a local prompt",)


def test_a_set_that_is_not_here_is_named_with_the_command_that_fetches_it():
    known = find_prompt_set("MJHQ-30K")
    assert known is not None
    with pytest.raises(InputError, match="playgroundai/MJHQ-30K") as caught:
        prompts_of_set(known)
    assert "hf download playgroundai/MJHQ-30K meta_data.json --repo-type dataset" in (caught.value.hint or "")
    for prompts in ("sDCI", DatasetPrompts(dataset="sDCI")):
        recipe = default_recipe("demo", calibration=Calibration(prompts=prompts, samples=1))
        with pytest.raises(InputError, match="svdquant-datasets"):
            chosen_prompts(recipe, RunOptions(), ignore_events)
