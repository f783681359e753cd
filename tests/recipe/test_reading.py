"""A recipe is read exactly or refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdq_cli.errors import InputError, RecipeError
from svdq_cli.recipe import DatasetPrompts, Gate, KeepOverride, RankOverride, load_recipe, parse_recipe
from svdq_cli.records import Int4, NvFp4

CONTRACT = """\
version: 1
model: {source: black-forest-labs/FLUX.1-dev, family: auto, dtype: bfloat16, loras: []}
calibration: {prompts: calib_prompts/general.txt, samples: 64, steps: 20, guidance: 3.5, height: 1024, seed: 0}
quantization: {precision: int4, effort: balanced, rank: 32}
layers:
  - {match: "transformer_blocks.*.ff.net.2", rank: 64}
  - {match: proj_out, keep: true}
outputs: [{format: nunchaku-lite, path: out/flux1-dev-int4}]
gates: {psnr_db: ">= 20", size_ratio: ">= 3.5"}
"""


def refusal(old: str, new: str) -> RecipeError:
    """The error of the contract's recipe with one part changed."""
    assert old in CONTRACT
    with pytest.raises(RecipeError) as caught:
        parse_recipe(CONTRACT.replace(old, new), "r.yaml")
    return caught.value


def test_the_recipe_of_the_contract_reads_as_written():
    recipe = parse_recipe(CONTRACT, "r.yaml")
    assert recipe.model.source == "black-forest-labs/FLUX.1-dev"
    assert recipe.calibration is not None
    assert recipe.calibration.prompts == "calib_prompts/general.txt"
    assert recipe.quantization.number_format == Int4()
    assert recipe.layers == (
        RankOverride(match="transformer_blocks.*.ff.net.2", rank=64),
        KeepOverride(match="proj_out", keep=True),
    )
    assert recipe.outputs[0].path == "out/flux1-dev-int4"
    assert recipe.gates == (Gate("psnr_db", ">=", 20.0), Gate("size_ratio", ">=", 3.5))


def test_a_recipe_can_be_two_lines_and_is_then_data_free():
    recipe = parse_recipe("version: 1\nmodel: {source: demo}", "r.yaml")
    assert recipe.calibration is None
    assert recipe.outputs == ()
    assert (recipe.quantization.precision, recipe.quantization.rank) == ("int4", 32)


def test_prompts_may_come_from_a_data_set():
    text = CONTRACT.replace("calib_prompts/general.txt", "{dataset: my.csv, column: caption}")
    calibration = parse_recipe(text, "r.yaml").calibration
    assert calibration is not None
    assert calibration.prompts == DatasetPrompts(dataset="my.csv", column="caption")


def test_nvfp4_and_an_automatic_rank_are_read():
    text = CONTRACT.replace("int4, effort: balanced, rank: 32", "nvfp4, effort: best, rank: auto")
    quantization = parse_recipe(text, "r.yaml").quantization
    assert quantization.number_format == NvFp4()
    assert quantization.rank == "auto"


def test_a_number_may_be_written_as_json_writes_it():
    calibration = parse_recipe(CONTRACT.replace("guidance: 3.5", "guidance: 35e-1"), "r.yaml").calibration
    assert calibration is not None
    assert calibration.guidance == 3.5


@pytest.mark.parametrize(
    ("old", "new", "message", "hint"),
    [
        ("rank: 32", "rnak: 32", "r.yaml:4: unknown key 'rnak' in quantization", "did you mean 'rank'?"),
        ("model:", "modle:", "r.yaml:2: unknown key 'modle' in the recipe", "did you mean 'model'?"),
        ("keep:", "kepe:", "r.yaml:7: unknown key 'kepe' in layers[1]", "did you mean 'keep'?"),
        ("path:", "pth:", "r.yaml:8: unknown key 'pth' in outputs[0]", "did you mean 'path'?"),
        ("psnr_db:", "psnr:", "r.yaml:9: unknown metric 'psnr' in gates", "did you mean 'psnr_db'?"),
        (
            "precision: int4",
            "precision: int8",
            "precision: must be int4 or nvfp4, not 'int8'",
            "did you mean 'int4'?",
        ),
        ("nunchaku-lite", "nunchaku-light", "outputs[0].format: must be nunchaku-lite or", "'nunchaku-lite'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest_valid_one(old: str, new: str, message: str, hint: str):
    error = refusal(old, new)
    assert message in error.message
    assert hint in (error.hint or "")


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("rank: 32", "modulation: keep", "put 'modulation' at the top of the recipe, outside of sections"),
        ("steps: 20", "effort: fast", "put 'effort' into 'quantization'"),
        ("version: 1", "version: 1\nrank: 32", "put 'rank' into 'quantization'"),
        ("format: nunchaku-lite", "precision: int4", "put 'precision' into 'quantization'"),
    ],
)
def test_a_key_in_the_wrong_section_is_answered_with_its_place(old: str, new: str, hint: str):
    assert refusal(old, new).hint == hint


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 20", "steps: twenty", "r.yaml:3: calibration.steps: must be a whole number, not 'twenty'"),
        ("steps: 20", 'steps: "20"', "r.yaml:3: calibration.steps: must be a whole number, not '20'"),
        ("steps: 20", "steps: 0", "r.yaml:3: calibration.steps: must be 1 or more, not 0"),
        ("guidance: 3.5", "guidance: yes", "calibration.guidance: must be a number, not true"),
        ("guidance: 3.5", "guidance: .nan", "calibration.guidance: must be a finite number, not nan"),
        ("height: 1024", "height: 100", "calibration.height: must be a multiple of 8, not 100"),
        ("rank: 32", "rank: 33", "r.yaml:4: quantization.rank: must be a multiple of 16, or auto, not 33"),
        ("rank: 32", "rank: 1600000000", "quantization.rank: must be at most 16384, not 1600000000"),
        ("rank: 64", "rank: 1600000000", "layers[0].rank: must be 16384 or less, not 1600000000"),
        ("rank: 32", "rank: true", "must be a multiple of 16, or auto, not True"),
        ("rank: 64", "rank: 63", "r.yaml:6: layers[0].rank: must be a multiple of 16, not 63"),
        ("keep: true", "keep: false", "layers[1].keep: must be true, not false"),
        ("keep: true", "keep: true, rank: 16", "r.yaml:7: layers[1]: the entry has both rank and keep"),
        (", rank: 64", "", "r.yaml:6: layers[0]: the entry does not say what to do with the layers"),
        ("source: black-forest-labs/FLUX.1-dev, ", "", "r.yaml:2: 'source' is missing in model"),
        ("calib_prompts/general.txt", "[a]", "calibration.prompts: must be text, not a list"),
        ("loras: []", "loras: [a]", "r.yaml:2: model.loras[0]: must be a section"),
        ("loras: []", "loras: [{path: a, wieght: 1}]", "unknown key 'wieght' in model.loras[0]"),
        (
            "effort: balanced",
            "effort: datafree, smoothing: grid",
            "smoothing: grid smoothing needs calibration",
        ),
        (
            "effort: balanced",
            "effort: balanced, search: [learned, scales]",
            "search: scales are searched within GPTQ",
        ),
        (
            "outputs: [",
            "outputs: [{path: out/flux1-dev-int4}, ",
            "two outputs have the path out/flux1-dev-int4",
        ),
        ('">= 20"', "20", "gates.psnr_db: '20' is not a condition on psnr_db"),
        ("version: 1\n", "version: 2\n", "r.yaml:1: version: must be 1, not 2"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(old: str, new: str, message: str):
    assert message in refusal(old, new).message


def test_a_recipe_without_version_says_what_to_add():
    error = refusal("version: 1\n", "")
    assert error.message == "r.yaml:1: the recipe has no 'version'"
    assert error.hint == "add the line: version: 1"


def test_several_mistakes_are_told_at_once_from_top_to_bottom():
    text = CONTRACT.replace("rank: 32", "rank: 33").replace("steps: 20", "stops: 20").replace("path:", "pth:")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    lines = caught.value.message.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["r.yaml:3", "r.yaml:4", "r.yaml:8"]
    assert "did you mean 'steps'?" in lines[0]


def test_a_key_given_twice_is_refused():
    error = refusal("gates:", "model: {source: other}\ngates:")
    assert error.message == "r.yaml:9: key 'model' is given twice"
    assert error.hint == "first in line 2"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers:", "layers: ]", "r.yaml:5: not YAML"),
        ('">= 20"', ">= 20", "r.yaml:9: not YAML"),
        ("version: 1", "version: \x01", "r.yaml:1: not YAML"),
        ("balanced", "!!python/name:os.system x", "r.yaml:4: the tag"),
        ("balanced", "&effort balanced", "r.yaml:4: anchors and aliases are not supported"),
        ("seed: 0", "<<: {seed: 0}", "r.yaml:3: '<<' is not a valid key"),
        ("seed: 0", "0: seed", "r.yaml:3: '0' is not a valid key"),
        ("seed: 0", "seed: " + "9" * 5000, "r.yaml:3: the value can't be read"),
        ("loras: []", "loras: " + "[" * 100_000, "r.yaml:2: nested deeper than 16 levels"),
        ("gates:", "---\ngates:", "not YAML"),
        (CONTRACT, "", "r.yaml:1: the recipe is empty"),
        (CONTRACT, "[1]", "r.yaml:1: must be a section of keys and values, not a list"),
        ("layers:", "# " + "x" * (1 << 20) + "\nlayers:", "r.yaml: larger than 1 MiB"),
    ],
)
def test_text_that_is_no_plain_yaml_is_refused(old: str, new: str, message: str):
    assert message in refusal(old, new).message


def test_a_syntax_error_over_an_unquoted_condition_speaks_of_quotes():
    assert "quotes" in (refusal('">= 20"', ">= 20").hint or "")


def test_errors_of_a_recipe_are_bad_usage_and_say_where():
    error = refusal("rank: 32", "rank: 33")
    assert (error.code, error.kind, error.where) == (2, "recipe", "r.yaml:4")


def test_a_recipe_file_that_does_not_exist_is_a_missing_input(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "none.yaml")
    assert (caught.value.code, caught.value.kind) == (3, "not-found")


def test_a_recipe_file_that_is_not_text_is_refused(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_saved_with_a_byte_order_mark_is_read(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(CONTRACT, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "r.yaml") == parse_recipe(CONTRACT, "r.yaml")


# ------------------------------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("steps: 20", "steps: 0", "for example 1"),
        ("steps: 20", 'steps: "20"', "write it like 20, without quotes"),
        ("steps: 20", "steps: 2.5", "without quotes or a fraction"),
        ("guidance: 3.5", 'guidance: "3.5"', "write it like 3.5, without quotes"),
        ("guidance: 3.5", "guidance: .inf", "write it like 3.5"),
        ("height: 1024", "height: 100", "for example 8, 16, 32"),
        ("rank: 32", "rank: 1600000000", "ranks 16, 32, 48, 64"),
        ("loras: []", "loras: [{path: 20}]", "quotes make text of a number"),
        ("loras: []", "loras: x", "write [a, b], or a line with - for each item"),
        ("loras: []", "loras: [{path: a, weight: 1e300}]", "for example 1000"),
        (
            "quantization: {precision: int4, effort: balanced, rank: 32}",
            "quantization: int4",
            "write key: value",
        ),
        ("version: 1\n", "version: '1'\n", "write 1 without quotes"),
    ],
)
def test_a_wrong_type_or_range_is_answered_with_what_to_write(old: str, new: str, hint: str):
    assert old in CONTRACT
    assert hint in (refusal(old, new).hint or "")


@pytest.mark.parametrize("section", ["quantization", "layers", "outputs", "gates", "components"])
def test_a_section_with_everything_commented_out_has_its_defaults(section: str):
    start = "version: 1\nmodel: {source: demo}\n"
    assert parse_recipe(f"{start}{section}:\n#  rank: 16\n", "r.yaml") == parse_recipe(start, "r.yaml")
