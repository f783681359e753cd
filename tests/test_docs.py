"""The documentation keeps up with the code: commands, quick start, workflows, kinds of errors."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image

from svdq_cli import errors
from svdq_cli.calibrate.pipelines import draw, load_source_pipeline
from svdq_cli.calibrate.settings import DrawSettings
from svdq_cli.cli import run
from svdq_cli.cli.app import app
from svdq_cli.demo.judge import look
from svdq_cli.evaluate.images import psnr_db
from svdq_cli.sampling import sampling_of
from svdq_cli.source import open_source

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))

QUICK_START = ROOT / "docs/quick-start.md"
# Options that are added to commands of the quick start, which take a minute each as they are written
ADDED = {
    "svdq convert recipe.yaml": "--effort datafree",
    "svdq eval out/model-int4 --against model --report report": "--samples 4 --without floor,own-noise,outputs",
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


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all of the quick start was run, command after command, then its Python."""
    folder = tmp_path_factory.mktemp("quick-start")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        commands = list(commands_of(QUICK_START))
        assert ADDED.keys() < set(commands)
        for command in commands:
            assert run(shlex.split(f"{command} {ADDED.get(command, '')}")[1:]) == 0, command
        (code,) = re.findall(r"```python\n(.*?)```", QUICK_START.read_text(encoding="utf-8"), re.DOTALL)
        torch.manual_seed(0)  # a reader's image starts from any noise
        names: dict[str, Any] = {}
        exec(code, names)
        names["picture"].save("python.png")
    return folder


@pytest.mark.parametrize("name", ["circle.png", "python.png"])
def test_the_quick_starts_images_show_what_their_prompt_says(quick_start: Path, name: str):
    with Image.open(quick_start / name) as image:
        background, objects = look(image)
        assert image.size == (96, 96)
    assert background == "white"
    assert [(each.color, each.shape) for each in objects] == [("red", "circle")]


def test_the_quick_starts_image_is_the_16_bit_models(quick_start: Path):
    """The same prompt, seed and settings: 39.8 dB. Of three other seeds the nearest image is at 26.7 dB."""
    source = open_source(quick_start / "model")
    sampling = sampling_of(source)
    settings = DrawSettings(
        steps=sampling.steps,
        guidance=sampling.guidance,
        height=sampling.height,
        width=sampling.width,
        seed=0,
        max_sequence_length=sampling.max_sequence_length,
    )
    pipe = load_source_pipeline(quick_start / "model", dtype=torch.float32)
    (exact,) = draw(pipe, [sampling.example_prompt], settings=settings)
    assert sampling.example_prompt in QUICK_START.read_text(encoding="utf-8")
    with Image.open(quick_start / "circle.png") as image:
        assert psnr_db(exact, image) > 32


def test_the_quick_starts_report_is_of_images_that_show_something(quick_start: Path):
    """All of them, 16-bit, naive and 4-bit: what was asked for, and close to one another."""
    report = json.loads((quick_start / "report/report.json").read_text(encoding="utf-8"))
    assert report["sixteen_bit_images"] == {
        "black": 0,
        "nearly_uniform": 0,
        "alike": False,
        "meaningless": False,
    }
    prompts = (quick_start / "report/prompts.txt").read_text(encoding="utf-8").splitlines()
    shown = 0
    for way in ("16bit", "converted"):
        for index, prompt in enumerate(prompts):
            with Image.open(quick_start / f"report/{way}/{index:04d}.png") as image:
                background, objects = look(image)
            shown += background in prompt and all(f"{each.color} {each.shape}" in prompt for each in objects)
    assert shown >= 7  # of 8: the model itself gets one image in twenty wrong
    assert report["psnr_db"]["min"] > 20


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
