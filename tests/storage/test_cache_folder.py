"""Where what can be made again is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from svdq_cli.storage import resources
from svdq_cli.storage.resources import cache_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="permissions as POSIX has them")


@pytest.fixture
def read_only_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home on a file system that is mounted for reading, and a folder for temporary files beside it."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.delenv("SVDQ_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setattr(resources.tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(resources.sys, "platform", "linux")
    allowed = os.access
    monkeypatch.setattr(
        resources.os, "access", lambda path, how: not Path(path).is_relative_to(home) and allowed(path, how)
    )
    resources._temporary_folder.cache_clear()
    yield temporary
    resources._temporary_folder.cache_clear()


def test_a_home_that_cant_be_written_leaves_the_cache_among_the_temporary_files(read_only_home: Path):
    folder = cache_folder()
    assert folder == read_only_home / f"svdq-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder


def test_a_temporary_folder_that_others_can_write_to_is_not_used(read_only_home: Path):
    """Kernels and the CPU engine are loaded from the cache and run."""
    planted = read_only_home / f"svdq-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    folder = cache_folder()
    assert folder != planted
    assert folder.parent == read_only_home
    assert folder.stat().st_mode & 0o077 == 0


def test_a_chosen_cache_is_never_replaced(read_only_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SVDQ_CACHE", str(read_only_home.parent / "home" / "mine"))
    assert cache_folder() == read_only_home.parent / "home" / "mine"
