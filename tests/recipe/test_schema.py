"""Defaults, overrides, and the three ways a recipe is written down: template, resolved JSON, schema."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from svdq_cli.errors import UsageError
from svdq_cli.recipe import (
    Calibration,
    DatasetPrompts,
    Gate,
    KeepOverride,
    Output,
    Quantization,
    RankOverride,
    Recipe,
    default_recipe,
    embedded,
    json_schema,
    parse_recipe,
    recipe_template,
    resolved,
    with_overrides,
)
from svdq_cli.storage.resources import data_root

FULL = Recipe.model_validate(
    {
        "version": 1,
        "model": {"source": "a model: it's #1", "family": "flux", "dtype": "float16", "revision": "v1"},
        "calibration": {
            "prompts": {"dataset": "d.csv", "split": "test", "column": "yes"},
            "guidance": 1e-05,
            "true_cfg": 4.0,
            "max_sequence_length": 256,
        },
        "quantization": {"precision": "nvfp4", "effort": "best", "smoothing": "closed-form", "rank": "auto"},
        "layers": [{"match": "*.attn.*", "rank": 16}, {"match": "null", "keep": True}],
        "outputs": [{"format": "comfy", "path": "out/ü.safetensors"}, {"path": "out/x"}],
        "gates": {"psnr_db.min": ">= 18.25", "ssim": "> 0.9"},
    }
)
BARE = default_recipe("demo")
CALIBRATED = default_recipe("demo", calibration=Calibration(prompts="p.txt", samples=8))


@pytest.mark.parametrize("recipe", [FULL, BARE, CALIBRATED], ids=["full", "bare", "calibrated"])
def test_the_template_of_a_recipe_parses_back_to_it(recipe: Recipe):
    assert parse_recipe(recipe_template(recipe), "template") == recipe


@pytest.mark.parametrize("recipe", [FULL, BARE], ids=["full", "bare"])
def test_the_template_shows_every_key_with_its_meaning(recipe: Recipe):
    text = recipe_template(recipe)
    for name, field in Recipe.model_fields.items():
        assert f"{name}:" in text
        assert name == "version" or f"# {field.description}" in text
    for key in [*Quantization.model_fields, *(Calibration.model_fields if recipe is FULL else ())]:
        assert f" {key}: " in text


def test_the_template_can_point_editors_at_the_schema():
    assert recipe_template(BARE, schema="s.json").startswith("# yaml-language-server: $schema=s.json\n")


@pytest.mark.parametrize("recipe", [FULL, BARE, CALIBRATED], ids=["full", "bare", "calibrated"])
def test_a_resolved_recipe_is_json_with_every_default_and_parses_back(recipe: Recipe):
    plain = resolved(recipe)
    again = parse_recipe(json.dumps(plain), "resolved")
    assert resolved(again) == plain
    assert plain["quantization"] == {
        **recipe.quantization.model_dump(),
        "smoothing": recipe.quantization.chosen_smoothing,
        "search": list(recipe.quantization.chosen_search),
    }


def test_what_is_embedded_does_not_say_where_it_was_written():
    plain = embedded(FULL, source="sha256:0123")
    assert resolved(FULL).keys() - plain.keys() == {"outputs", "gates"}
    assert parse_recipe(json.dumps(plain), "embedded").model == FULL.model.model_copy(
        update={"source": "sha256:0123", "base": None}
    )


def test_the_committed_schema_is_current():
    """After a change, write `json_schema()` there again: JSON with indent 2 and a final newline."""
    committed = (data_root("configs") / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def test_the_search_steps_are_the_effort_s_unless_the_recipe_says_others():
    assert Quantization(effort="fast").chosen_search == ("refine",)
    steps = ("learned", "refine", "gptq", "scales", "refit", "output")
    assert Quantization(effort="balanced").chosen_search == steps
    assert Quantization(effort="fast", search=("refit", "gptq")).chosen_search == ("gptq", "refit")


def test_the_smoothing_is_the_effort_s_unless_the_recipe_says_one():
    assert Quantization(effort="datafree").chosen_smoothing == "none"
    assert Quantization(effort="fast").chosen_smoothing == "grid"
    assert Quantization(effort="fast", smoothing="closed-form").chosen_smoothing == "closed-form"


def test_a_recipe_never_changes_after_reading():
    with pytest.raises(ValidationError):
        BARE.version = 1  # type: ignore[misc]


def test_options_win_over_the_recipe():
    outputs = [Output(path="elsewhere")]
    recipe = with_overrides(
        FULL,
        {
            "quantization.precision": "int4",
            "quantization.effort": "fast",
            "quantization.rank": 48,
            "calibration.seed": 7,
            "quantization.seed": 7,
            "outputs": outputs,
        },
    )
    assert recipe.quantization == Quantization(
        precision="int4", effort="fast", smoothing="closed-form", rank=48, seed=7
    )
    assert recipe.calibration is not None
    assert recipe.calibration.seed == 7
    assert recipe.calibration.prompts == DatasetPrompts(dataset="d.csv", split="test", column="yes")
    assert recipe.outputs == tuple(outputs)


def test_what_no_option_speaks_of_stays():
    assert with_overrides(FULL, {}) == FULL
    recipe = with_overrides(FULL, {"quantization.rank": 16})
    assert recipe.layers == (RankOverride(match="*.attn.*", rank=16), KeepOverride(match="null", keep=True))
    assert recipe.gates == (Gate("psnr_db.min", ">=", 18.25), Gate("ssim", ">", 0.9))


def test_prompts_given_as_an_option_calibrate_a_bare_model():
    calibration = with_overrides(
        BARE,
        {
            "calibration.prompts": "p.txt",
            "calibration.samples": 4,
            "calibration.seed": 3,
            "quantization.seed": 3,
        },
    ).calibration
    assert calibration == Calibration(prompts="p.txt", samples=4, seed=3)


def test_samples_without_a_calibration_are_refused():
    with pytest.raises(UsageError, match="--samples: these options need --prompts"):
        with_overrides(BARE, {"calibration.samples": 4})


def test_a_key_that_the_recipe_does_not_have_is_refused():
    with pytest.raises(UsageError, match="--rnak: unknown key"):
        with_overrides(BARE, {"quantization.rnak": 16})


def test_effort_datafree_as_an_option_drops_the_recipe_s_smoothing():
    assert with_overrides(FULL, {"quantization.effort": "datafree"}).quantization.chosen_smoothing == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization.rank": 17}, "--rank: must be a multiple of 16, or auto, not 17"),
        ({"quantization.precision": "fp8"}, "--precision: must be int4 or nvfp4, not 'fp8'"),
        ({"calibration.seed": -1}, "--seed: must be 0 or more, not -1"),
        ({"quantization.seed": 2**64}, f"--seed: must be {2**64 - 1} or less, not {2**64}"),
        ({"calibration.prompts": ""}, "--prompts: must not be empty"),
        (
            {"quantization.effort": "datafree", "quantization.smoothing": "grid"},
            "--smoothing: grid smoothing needs calibration",
        ),
    ],
)
def test_a_bad_option_is_bad_usage_and_named(options: dict[str, str | int], message: str):
    with pytest.raises(UsageError) as caught:
        with_overrides(CALIBRATED, options)
    assert message in caught.value.message
