"""The documentation keeps up with the code: commands, quick start, workflows, kinds of errors."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from svdq_cli import errors
from svdq_cli.cli import run
from svdq_cli.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

# Of the quick start, what is not run here, and why
SKIPPED = {
    "svdq convert recipe.yaml": "calibrates for minutes; the same command with --plan is run",
    "svdq eval out/model-int4 --against model --report report": "needs the calibrated conversion above it",
    "svdq push out/model-int4 owner/model-int4 --dry-run": "likewise",
}


def commands_of(path: Path) -> Iterator[str]:
    """The lines that call svdq in code blocks, indented or fenced, and in workflows' `run:`."""
    fenced = False
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        fenced ^= line.startswith("```")
        found = re.match(r"(?P<before> {4}|\s*(?:- )?run: |)(?P<command>svdq [a-z].*)$", line)
        if found and (fenced or found["before"]):
            yield re.split(r"\s+(?:#|>|&&|\|)", found["command"])[0]


COMMANDS = [
    pytest.param(command, id=f"{path.relative_to(ROOT)}: {command[:60]}")
    for path in [*PAGES, *WORKFLOWS]
    for command in commands_of(path)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_options_that_the_documentation_says(command: str):
    if "…" in command or "..." in command:
        pytest.skip("a form, not a command")
    words = shlex.split(command, comments=True)[1:]
    group: Any = typer.main.get_command(app)
    found = group.commands.get(words[0])
    assert found is not None, f"no command {words[0]}"
    if "--summary" in words:  # whose check opens the file
        words[words.index("--summary") + 1] = os.devnull
    found.make_context(words[0], words[1:])


def test_the_quick_start_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ran = 0
    for command in commands_of(ROOT / "docs/quick-start.md"):
        if command in SKIPPED:
            continue
        assert run(shlex.split(command)[1:]) == 0, command
        ran += 1
    assert ran >= 6
    assert (tmp_path / "circle.png").is_file()


def test_the_workflows_commands_run_as_written(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a tiny model instead of the demo's, by the workflow's own variables. Publishing needs the hub: a dry run."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {{source: {tiny_flux}}}\nquantization: {{effort: datafree, rank: 16}}\n"
        f"calibration: {{prompts: calib_prompts/demo_eval.txt, samples: 1, steps: 1, height: 32, width: 32}}\n"
        f"outputs: [{{path: out/tiny}}]\n"
    )
    monkeypatch.chdir(tmp_path)
    values = {
        "RECIPE": str(recipe),
        "SOURCE": str(tiny_flux),
        "CHECKPOINT": "out/tiny",
        "REPOSITORY": "owner/name --dry-run",
        "GITHUB_STEP_SUMMARY": "summary.md",
    }
    for command in commands_of(ROOT / ".github/workflows/convert.yml"):
        for name, value in values.items():
            command = command.replace(f'"${name}"', value)
        assert "$" not in command
        assert run(shlex.split(command)[1:]) == 0, command
    summary = (tmp_path / "summary.md").read_text()
    assert [line for line in summary.splitlines() if line.startswith("### ")] == [
        "### svdq convert: ok",
        "### svdq check: ok",
        "### svdq eval: ok",
        "### svdq bench: ok",
        "### svdq push: planned",
    ]


# ------------------------------------------------------------------------------------------------- kinds of errors


def kinds_in_code() -> dict[str, set[int]]:
    """Every kind that an error can have, with its exit codes, from the calls that make errors."""
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.SvdqError)
    }
    found: dict[str, set[int]] = {}
    for kind in classes.values():
        found.setdefault(kind.default_kind, set()).add(kind.code)
    for path in (ROOT / "svdq_cli").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in classes:
                for keyword in call.keywords:
                    if keyword.arg == "kind" and isinstance(keyword.value, ast.Constant):
                        found.setdefault(str(keyword.value.value), set()).add(classes[call.func.id].code)
    return found


def test_the_troubleshooting_page_has_every_kind_with_its_exit_code():
    told: dict[str, set[int]] = {}
    for line in (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").splitlines():
        if row := re.match(r"\| (`[^|]*`) \| ([\d, ]+) \|", line):
            for kind in re.findall(r"`([^`]+)`", row[1]):
                told[kind] = {int(code) for code in row[2].split(",")}
    in_code = kinds_in_code()
    assert in_code.keys() - told.keys() == set(), "kinds that the page does not explain"
    assert {kind: codes for kind, codes in in_code.items() if not codes <= told[kind]} == {}
    helpers = {"lora", "lora-mismatch", "not-finite"}  # whose kind is a helper's argument
    assert told.keys() - in_code.keys() <= helpers, "kinds that no error has"
