"""The documentation keeps up with the code: commands, quick start, workflows, kinds of errors."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from PIL import Image

from svdq_cli import errors
from svdq_cli.cli import run
from svdq_cli.cli.app import app
from svdq_cli.evaluation.images import psnr_db
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.load import load_source_pipeline
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.sampling import sampling_of
from svdq_cli.source import open_source
from tools.train_demo.judge import look

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
        names["image"].save("python.png")
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
    settings = SamplingSettings(
        steps=sampling.steps,
        guidance=sampling.guidance,
        height=sampling.height,
        width=sampling.width,
        seed=0,
        max_sequence_length=sampling.max_sequence_length,
    )
    pipe = load_source_pipeline(quick_start / "model", dtype=torch.float32)
    (exact,) = generate_images(pipe, [sampling.example_prompt], settings=settings)
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with svdq as pip unpacks its wheel: the package, and its data inside."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(
        ROOT / "svdq_cli", folder / "svdq_cli", ignore=shutil.ignore_patterns("__pycache__", "_data")
    )
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.split("[tool.hatch.build.targets.wheel.force-include]")[1].split("[")[0]
    for here, there in re.findall(r'"(.+)" = "(.+)"', table):
        shutil.copytree(ROOT / here, folder / there)
    return folder


def test_the_workflows_commands_run_as_written_from_another_repository(
    installed: Path, tiny_flux: Path, tmp_path: Path
):
    """With svdq installed and no clone of it around, on a recipe of that repository and a tiny model instead of the
    demo's, by the workflow's own variables. Publishing needs the hub: a dry run."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.yaml").write_text(
        f"version: 1\nmodel: {{source: {tiny_flux}}}\nquantization: {{effort: datafree, rank: 16}}\n"
        f"calibration: {{prompts: calib_prompts/demo_eval.txt, samples: 1, steps: 1, height: 32, width: 32}}\n"
        f"outputs: [{{path: out/tiny}}]\n"
    )
    variables = {
        "RECIPE": "recipes/tiny.yaml",
        "SOURCE": str(tiny_flux),
        "CHECKPOINT": "out/tiny",
        "REPOSITORY": "owner/name --dry-run",
        "GITHUB_STEP_SUMMARY": "summary.md",
    }
    commands = list(commands_of(ROOT / ".github/workflows/convert.yml"))
    assert len(commands) == 6
    program = (
        "import json, os, shlex, sys\n"
        "import svdq_cli\n"
        "from svdq_cli.cli import run\n"
        "print(svdq_cli.__file__, file=sys.stderr)\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    command = command.replace('\"', '') if 'REPOSITORY' in command else command\n"
        "    words = shlex.split(os.path.expandvars(command))\n"
        "    assert run([*words[1:], '-q']) == 0, command\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        cwd=tmp_path,
        env={**os.environ, **variables, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stderr.splitlines()[0]
    summary = (tmp_path / "summary.md").read_text()
    assert [line for line in summary.splitlines() if line.startswith("### ")] == [
        "### svdq convert: ok",
        "### svdq check: ok",
        "### svdq eval: ok",
        "### svdq bench: ok",
        "### svdq push: planned",
    ]


def test_an_installed_svdq_has_its_recipes_prompts_and_manual(installed: Path, tmp_path: Path):
    program = (
        "from svdq_cli.cli import run\n"
        "assert run(['recipes']) == 0\n"
        "assert run(['convert', '--help']) == 0\n"
        "from svdq_cli.prepare.from_command_line import recipe_of\n"
        "from svdq_cli.recipe import find_prompts\n"
        "recipe, beside = recipe_of('flux1-dev-int4')\n"
        "print(find_prompts(recipe.calibration.prompts, beside))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert any(line.startswith("flux1-dev-int4 ") for line in lines)
    (page,) = [line.split(": ")[1] for line in lines if line.startswith("Learn more: ")]
    for path in (page, lines[-1]):
        assert Path(path).is_relative_to(installed)
        assert Path(path).is_file()


@pytest.mark.parametrize("workflow", ["convert.yml", "nightly.yml"])
def test_a_copied_workflow_installs_svdq_and_not_the_repository_that_it_is_in(workflow: str, tmp_path: Path):
    """Its install step, with a `python` that shows what it is called with."""
    text = (ROOT / ".github/workflows" / workflow).read_text(encoding="utf-8")
    steps = re.findall(r"run: (python -m pip install .*)", text)
    assert steps
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for step in steps:
        for name, code in (("", 1), ("git+https://example.org/svdq@v1", 0)):
            done = subprocess.run(
                ["bash", "-e", "-c", step],
                env={"PATH": path, "SVDQ": name},
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode != 0) == bool(code)
            assert ("set the variable SVDQ" in done.stderr) == bool(code)
            if not code:
                assert done.stdout.startswith(f"-m pip install {name} ")


def test_the_page_on_ci_explains_every_line_of_the_workflow():
    page = (ROOT / "docs/ci.md").read_text(encoding="utf-8").split("### convert.yml, line by line")[1]
    workflow = (ROOT / ".github/workflows/convert.yml").read_text(encoding="utf-8")
    variables = re.findall(r"^  ([A-Z]+):", workflow, re.MULTILINE)
    steps = [f"step `{name}`" for name in re.findall(r"- name: (.*)", workflow)]
    actions = re.findall(r"uses: ([\w/-]+)@", workflow)
    assert variables
    assert steps
    assert actions
    told = [
        *(f"`{name}`" for name in variables),
        *steps,
        *actions,
        "`runs-on`",
        "permissions",
        "workflow_dispatch",
    ]
    assert [line for line in told if line not in page] == []


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
    assert told.keys() == set(get_args(errors.Kind)), "the page and errors.Kind list different kinds"
    assert {kind: codes for kind, codes in in_code.items() if not codes <= told[kind]} == {}
    helpers = {"lora", "lora-mismatch", "not-finite"}  # whose kind is a helper's argument
    assert told.keys() - in_code.keys() <= helpers, "kinds that no error has"


def test_every_exit_code_but_those_of_an_interruption_has_its_place_in_the_order_of_severity():
    classes = [errors.SvdqError, *errors.SvdqError.__subclasses__()]
    ending = {each.code for each in classes if not issubclass(each, errors.InterruptedRunError)}
    assert set(errors.SEVERITY) == {0, *ending}
