"""The help of every command: options in groups with their defaults, examples that parse, and the manual's address."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from svdq_cli.cli import run
from svdq_cli.cli.app import COMMANDS, app
from svdq_cli.cli.help import REST, group_of
from svdq_cli.recipe import Calibration, Quantization, default_recipe

GROUP = typer.main.get_command(app)


def command_of(name: str) -> Any:
    return GROUP.commands[name]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_groups_examples_and_the_manual_s_page(
    name: str, capsys: pytest.CaptureFixture[str]
):
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Reporting:" in text
    assert f"Examples:\n  svdq {name}" in text
    page = re.search(r"Learn more: (.*)", text)
    assert page is not None
    assert Path(page[1]).is_file()
    assert max(map(len, text.split("Examples:")[0].splitlines())) <= 80


@pytest.mark.parametrize(
    "example", [line for _, manual in COMMANDS.values() for line in manual.examples], ids=str
)
def test_every_example_parses(example: str):
    program, name, *words = shlex.split(example)
    assert program == "svdq"
    command_of(name).make_context(name, words)


@pytest.mark.parametrize("name", ["calibrate", "check", "convert", "eval", "generate", "init", "inspect"])
def test_every_option_of_the_main_commands_has_a_group(name: str):
    options = [param for param in command_of(name).params if param.param_type_name == "option"]
    assert [param.opts for param in options if group_of(param) == REST] == []


def test_the_defaults_that_help_tells_are_the_recipe_s(capsys: pytest.CaptureFixture[str]):
    assert run(["convert", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    quantization, output = Quantization(), default_recipe("demo").outputs
    told = re.findall(r"\(default: ([\w-]+)", text)
    assert {quantization.precision, str(quantization.rank), quantization.effort, "nunchaku-lite"} <= set(told)
    assert not output
    assert Calibration(prompts="p.txt").seed == 0


def complete(words: str, tmp_path: Path) -> list[str]:
    """What bash would offer after `words`."""
    environment = {
        **os.environ,
        "_SVDQ_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "svdq_cli"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    return done.stdout.split()


def test_a_shell_completes_commands_options_values_and_recipes(tmp_path: Path):
    assert "convert" in complete("svdq con", tmp_path)
    assert "--prompts" in complete("svdq convert --pro", tmp_path)
    assert complete("svdq convert --effort b", tmp_path) == ["balanced", "best"]
    assert complete("svdq convert flux1-dev", tmp_path) == ["flux1-dev-int4", "flux1-dev-nvfp4"]
    assert complete("svdq convert ", tmp_path) == []  # files, by the shell itself


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed_and_installed(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import shellingham

    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, shell))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["--show-completion"]) == 0
    assert f"_SVDQ_COMPLETE=complete_{shell}" in capsys.readouterr().out
    assert run(["--install-completion"]) == 0
    assert f"{shell} completion is installed in {tmp_path}" in capsys.readouterr().out


def test_a_shell_that_is_not_known_is_told_which_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import shellingham

    def unknown():
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", unknown)
    monkeypatch.setenv("SHELL", "/bin/nosh")
    assert run(["--show-completion"]) == 4
    assert "bash, zsh, fish" in capsys.readouterr().err
