"""What diffusers says is taken from the cache only as long as it would say the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from svdq_cli.conversion.memory import reserved_ram
from svdq_cli.storage import library_facts
from svdq_cli.storage.library_facts import Cost, kept_library_facts, library_fact, spared_cost
from svdq_cli.system.machine import resident_ram
from tests.full_size import FLUX_DEV


class _Library:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> object:
        self.asked += 1
        return {"shape": (self.asked, 2)}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Library:
    """In a process that has not imported diffusers, with an empty cache."""
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    return _Library()


def _fact(library: Callable[[], object], *about: str) -> object:
    with kept_library_facts():
        return library_fact("shapes", about, library)


def test_a_fact_is_asked_for_once_and_the_cache_gives_what_was_answered(library: _Library) -> None:
    assert [_fact(library, "A", "{}"), _fact(library, "A", "{}")] == [{"shape": [1, 2]}] * 2
    assert library.asked == 1


def test_another_config_another_kind_and_another_version_are_other_facts(
    library: _Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fact(library, "A", "{}")
    _fact(library, "A", '{"depth": 2}')
    with kept_library_facts():
        library_fact("inventory", ("A", "{}"), library)
    monkeypatch.setattr(library_facts, "_environment", lambda: ("diffusers 99",))
    _fact(library, "A", "{}")
    assert library.asked == 4


def test_a_changed_source_file_is_asked_again(
    library: _Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "transformer_made_up.py"
    source.write_text("WIDTH = 1")
    module = ModuleType("diffusers.transformer_made_up")
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, "diffusers.transformer_made_up", module)
    _fact(library)
    source.write_text("WIDTH = 16")
    assert _fact(library) == {"shape": [2, 2]}
    source.unlink()
    assert _fact(library) == {"shape": [3, 2]}


@pytest.mark.parametrize("damage", ["", "no digest", "cut", "other"])
def test_a_damaged_entry_is_asked_again(library: _Library, tmp_path: Path, damage: str) -> None:
    _fact(library)
    (entry,) = (tmp_path / "cache" / "library").glob("*.json")
    whole = entry.read_text()
    entry.write_text(
        {"cut": whole[:-20], "other": whole.replace('"shape": [1', '"shape": [7')}.get(damage, damage)
    )
    assert entry.read_text() != whole
    assert _fact(library) == {"shape": [2, 2]}
    assert _fact(library) == {"shape": [2, 2]}


def test_a_cache_that_cannot_be_written_is_none(
    library: _Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path / "file" / "cache"))
    assert [_fact(library), _fact(library)] == [{"shape": [1, 2]}, {"shape": [2, 2]}]


def test_nothing_is_taken_or_kept_outside_nor_in_a_program_that_has_diffusers(
    library: _Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library_fact("shapes", (), library)
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    _fact(library)
    assert library.asked == 2
    assert not (tmp_path / "cache").exists()


def test_what_fails_is_not_kept(library: _Library, tmp_path: Path) -> None:
    def fails() -> object:
        raise ValueError("no such class")

    with pytest.raises(ValueError, match="no such class"):
        _fact(fails)
    assert not (tmp_path / "cache").exists()


def test_the_oldest_entries_go(library: _Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library_facts, "_MOST_ENTRIES", 3)
    for number in range(5):
        _fact(library, str(number))
    assert len(list((tmp_path / "cache" / "library").iterdir())) == 3


def test_a_prediction_counts_what_a_conversion_imports_besides(
    library: _Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter([1000, 5000])
    monkeypatch.setattr(library_facts, "resident_ram", lambda: next(held))
    _fact(library)
    assert spared_cost() == Cost()
    _fact(library)
    assert spared_cost().bytes == 4000
    monkeypatch.setattr("svdq_cli.conversion.memory.spared_cost", lambda: Cost(1.0, 8 * 2**30))
    assert reserved_ram() > resident_ram() + 8 * 2**30


def test_inspect_says_the_same_the_second_time_without_diffusers(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**FLUX_DEV, "num_layers": 1, "num_single_layers": 1}))
    program = (
        "import sys; from svdq_cli.cli import run; code = run(sys.argv[1:]);"
        "print('diffusers' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program, "inspect", str(config), "--json"],
            env={**os.environ, "SVDQ_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    ]
    assert said[0].stdout == said[1].stdout
    assert [run.stderr.split()[-1] for run in said] == ["True", "False"]
