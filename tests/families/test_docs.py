"""The pages of docs/families say what the family files say, and full-size models are planned as published."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from svdq_cli.errors import InputError
from svdq_cli.families import FAMILIES, find_family
from svdq_cli.recipe import load_recipe
from svdq_cli.source import open_source
from svdq_cli.storage.resources import data_root
from tests.tiny_families import PUBLISHED
from tools.layer_table import CONFIGS, PAGES, plan_of_config, rewritten


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_model_is_planned_from_its_config(model: str):
    plan = plan_of_config(model)
    found = (len(plan.w4a4), len(plan.w4a16), len(plan.kept), plan.parameters)
    assert found == PUBLISHED[model]


def test_every_published_config_is_of_one_family_only():
    for model in PUBLISHED:
        config = open_source(CONFIGS / f"{model}.json").config
        assert [family.name for family in FAMILIES if family.matches(config)] == [
            plan_of_config(model).family
        ]
        nameless = {key: value for key, value in config.items() if key != "_class_name"}
        assert find_family(nameless) == find_family(config), model


def test_the_class_of_pixart_s_official_config_becomes_the_present_one():
    assert plan_of_config("pixart-sigma-xl2-1024").model_class == "PixArtTransformer2DModel"


def test_a_model_that_fits_no_kernel_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"out_features 2240 is not a multiple of 128"):
        plan_of_config("sana-1600m-1024", of_lite=True)


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_current(page: Path):
    """After a change: python -m tools.layer_table"""
    text = page.read_text(encoding="utf-8")
    assert text == rewritten(text)


def test_every_family_has_a_page_with_a_table_and_ready_recipes():
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    tables = "".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    recipes = [load_recipe(path) for path in data_root("configs").glob("*.yaml")]
    for family in FAMILIES:
        row = re.search(rf"\| \[{family.name}\]\(([\w-]+\.md)\) \|", index)
        assert row, family.name
        assert (PAGES / row[1]).is_file(), family.name
        named = [recipe for recipe in recipes if recipe.model.family == family.name]
        assert {recipe.quantization.precision for recipe in named} == {"int4", "nvfp4"}, family.name
    for model in PUBLISHED:
        assert f"<!-- layers of {model} -->\n| where |" in tables, model
