"""The table of options that set keys of the recipe: one row makes an option of every command that it is on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from svdq_cli.cli import options as opt
from svdq_cli.cli import run
from svdq_cli.cli.app import COMMANDS
from svdq_cli.recipe import Calibration, Model, Quantization, Recipe

# Keys in the command line's own words, which prepare.from_command_line turns into the recipe's
OWN_WORDS = {"calibration.prompts.column", "outputs.format"}


SECTIONS = {"model": Model, "calibration": Calibration, "quantization": Quantization}


def keys_of_the_recipe() -> set[str]:
    inner = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    return inner | Recipe.model_fields.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_the_table_sets_keys_that_the_recipe_has(command: str):
    for _, setting in opt.recipe_options_on(command).values():
        assert set(setting.keys) <= keys_of_the_recipe() | OWN_WORDS


def test_every_row_of_the_table_is_on_commands_that_there_are():
    rows = {name: setting for each in COMMANDS for name, (_, setting) in opt.recipe_options_on(each).items()}
    assert {"rank", "batch_size", "seed", "image_seed"} <= rows.keys()
    assert {command for setting in rows.values() for command in setting.on} <= COMMANDS.keys()


def test_a_new_row_is_an_option_with_help_and_its_value_comes_by_the_recipe_s_key(
    monkeypatch: pytest.MonkeyPatch,
):
    row = Annotated[
        int | None,
        typer.Option(metavar="N", help="Rounds without calibration."),
        opt.sets("quantization.refinements", on="convert"),
    ]
    monkeypatch.setattr(opt, "Refinements", row, raising=False)
    seen: list[Any] = []

    @opt.recipe_options("convert")
    def convert(source: str, given: opt.Given = opt.NOTHING) -> None:
        seen.append((source, dict(given)))

    app = typer.Typer()
    app.command()(convert)
    assert "Rounds without calibration." in CliRunner().invoke(app, ["--help"]).output
    assert CliRunner().invoke(app, ["model", "--refinements", "6", "--rank", "64"]).exit_code == 0
    assert CliRunner().invoke(app, ["model"]).exit_code == 0
    assert seen == [
        ("model", {"quantization.rank": 64, "quantization.refinements": 6}),
        ("model", {}),
    ]


def test_a_home_that_no_shell_expanded_is_expanded(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A shell leaves `~` as it is in `--option=~/file`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "home" / "out"
    words = "--effort datafree --rank 16 -q --output=~/out --events=~/events.jsonl --summary=~/summary.md"
    assert run(["convert", str(tiny_flux), *words.split()]) == 0
    assert run(["check", "~/missing", "--summary=~/failed.md"]) == 3
    assert out.is_dir()
    assert {path.name for path in out.parent.glob("*.*")} == {"events.jsonl", "summary.md", "failed.md"}
    assert not (tmp_path / "~").exists()
