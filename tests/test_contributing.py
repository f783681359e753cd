"""CONTRIBUTING.md and docs/architecture.md name files and functions that exist, and trace a conversion as it runs."""

from __future__ import annotations

import ast
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from svdq_cli.cli import run
from tools import rooms

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "svdq_cli"
GUIDE = ROOT / "CONTRIBUTING.md"
PAGES = (GUIDE, ROOT / "docs/architecture.md")
_PLACE = re.compile(r"`(?P<file>[\w/]+\.py):(?P<name>\w+)`")


def spans(text: str) -> list[str]:
    """What stands between backticks outside of code blocks."""
    return re.findall(
        r"`([^`\n]+)`", re.sub(r"^```.*?^```|^ {4}.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    )


def defined_in(path: Path) -> set[str]:
    """Functions, methods and classes of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {
        node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_function_that_a_page_names_exists(page: Path):
    found = 0
    for span in spans(page.read_text(encoding="utf-8")):
        path, _, name = span.partition(":")
        if not re.fullmatch(r"[\w./-]+(\.py|/)", path):
            continue
        found += 1
        (home,) = [base for base in (PACKAGE, ROOT) if (base / path).exists()][:1] or pytest.fail(
            f"{page.name}: {span}"
        )
        assert not name or name in defined_in(home / path), f"{page.name}: {span}"
    assert found > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)", text):
        assert (page.parent / target).exists(), target


def test_a_docstring_names_modules_that_exist():
    """`room.module` in a module's docstring is a file of that room."""
    found = 0
    for path in PACKAGE.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for name in re.findall(r"`([a-z_]+\.[a-z_.]+)`", docstring):
            room, module = name.split(".")[:2]
            if not (PACKAGE / room).is_dir():
                continue
            found += 1
            home = PACKAGE / room
            assert (home / f"{module}.py").exists() or (home / module).is_dir(), f"{path}: {name}"
    assert found > 10


def test_the_table_of_rooms_is_that_of_the_import_contract_and_the_docstrings():
    """After a change: python -m tools.rooms"""
    text = rooms.PAGE.read_text(encoding="utf-8")
    assert rooms.rewritten(text) == text
    assert {room for floor in rooms.floors() for room in floor} == {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }


def trace() -> list[tuple[str, list[tuple[str, str]]]]:
    """The rows of the traced conversion: what is printed, and (file, function) of what makes it."""
    table = GUIDE.read_text(encoding="utf-8").split("<!-- trace -->")[1].split("<!-- end of trace -->")[0]
    rows = [
        line.strip("| ").partition(" | ") if not line.startswith("| | ") else ("", "", line[4:])
        for line in table.strip().splitlines()[2:]
    ]
    return [(printed.strip("` "), _PLACE.findall(made)) for printed, _, made in rows]


def numbers_vary(text: str) -> str:
    """A pattern of the text in which every number may be another one."""
    return re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(text))


def test_the_traced_conversion_prints_those_lines_and_calls_those_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    called: set[tuple[str, str]] = set()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.add((frame.f_code.co_filename, frame.f_code.co_name))

    monkeypatch.chdir(tmp_path)
    _profiled(watch, lambda: run(["convert", "demo", "--effort", "datafree", "-v", "-o", "out"]))
    printed = "\n".join(reversed(capfd.readouterr()))  # progress, then the result
    begin = 0
    for line, places in trace():
        found = re.compile(numbers_vary(line)).search(printed, begin)
        assert found is not None, f"not printed after what comes before it: {line}"
        begin = found.start()
        for file, name in places:
            assert (str(PACKAGE / file), name) in called, f"{file}:{name} was not called"


def _profiled(watch: Callable[[FrameType, str, object], None], work: Callable[[], int]) -> None:
    """Do the work, with every call of a Python function in any of its threads told to `watch`."""
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        assert work() == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
