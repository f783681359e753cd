"""A disk that fills up, whatever is being written: exit code 5, kind `disk-full`, and nothing half-written is left.

The disk is full for one file of the run: its sync fails, after all of it was written under its partial name.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from svdq_cli.cli import run
from svdq_cli.cpu import engine
from svdq_cli.cpu.engine import lack_of_engine
from svdq_cli.errors import EnvironmentLacksError, OutOfResourcesError
from svdq_cli.evaluation import run as evaluation
from svdq_cli.inference.backend import choose_backend
from svdq_cli.prepare.locate import locate_source
from svdq_cli.recipe import default_recipe
from svdq_cli.storage import atomic


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square\n")
    return path


@pytest.fixture
def full_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From now on the disk is full for every file whose path holds this text."""
    sync = atomic.sync_files

    def begin(text: str) -> None:
        def fail(path: Path) -> None:
            files = [file for file in (path, *path.rglob("*")) if file.is_file()]
            assert files, f"nothing was written to {path}"
            for file in files:
                if text in str(file):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            sync(path)

        monkeypatch.setattr(atomic, "sync_files", fail)

    return begin


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if atomic.is_unfinished(path.name)]


def failure(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    capsys.readouterr()
    code = run([*words.split(), "--json"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (code, report["error"]["code"], report["error"]["kind"]) == (5, 5, "disk-full"), captured.err
    assert "free some space" in report["error"]["hint"]
    assert captured.err.startswith("svdq: ")
    return report["error"]


@pytest.mark.parametrize(
    ("what", "file", "command"),
    [
        ("the journal of the work", "journal.json", "convert {model} --effort datafree --rank 16 -o {out}"),
        ("the batches of statistics", "pictures/", "calibrate {model} --prompts {prompts} {small} -o {out}"),
        ("statistics", "stats-00001", "calibrate {model} --prompts {prompts} {small} -o {out}"),
        (
            "statistics' manifest",
            "manifest",
            "convert {model} --prompts {prompts} {small} --rank 16 -o {out}",
        ),
        ("solved layers", "layers/", "convert {model} --effort datafree --rank 16 -o {out}"),
        ("a checkpoint", "diffusion_pytorch", "convert {model} --effort datafree --rank 16 -o {out}"),
        ("a checkpoint's report", "svdq_report", "convert {model} --effort datafree --rank 16 -o {out}"),
        (
            "a single file",
            "out.partial",
            "convert {model} --effort datafree --rank 16 --format comfy -o {out}",
        ),
        ("an exported file", "out.partial", "export {int4} --to nunchaku -o {out}"),
        ("a recipe", "out.yaml.partial", "init {model} -o {out}.yaml"),
        ("the embedded model", "model_index", "demo --export {out}"),
    ],
)
def test_a_disk_that_fills_up_is_said_so_and_leaves_no_output(
    what: str,
    file: str,
    command: str,
    tiny_flux: Path,
    converted_flux: Callable[[str], Path],
    prompts: Path,
    tmp_path: Path,
    full_for: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "out"
    int4 = converted_flux("int4") / "lite" if "{int4}" in command else None
    small = "--samples 2 --steps 1 --height 32 --width 32"
    full_for(file)
    failure(capsys, command.format(model=tiny_flux, out=out, prompts=prompts, small=small, int4=int4) + " -q")
    assert not out.exists()
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("file", ["run.json", "16bit/", "converted/", "report.json", "report.html"])
def test_an_evaluation_keeps_what_it_has_when_the_disk_fills_up(
    file: str,
    tiny_flux: Path,
    converted_flux: Callable[[str], Path],
    prompts: Path,
    tmp_path: Path,
    full_for: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
):
    folder, int4 = tmp_path / "report", converted_flux("int4") / "lite"
    full_for(file)
    words = f"eval {int4} --against {tiny_flux} --prompts {prompts} --samples 1 --report {folder} -q"
    hint = failure(capsys, words)["hint"]
    assert "another disk with --report" in hint
    assert ("keeps the images generated so far" in hint) == (file != "run.json")
    assert unfinished(tmp_path) == []
    for found in folder.rglob("*.json"):
        json.loads(found.read_text())


def test_a_generated_image_is_whole_or_absent(
    converted_flux: Callable[[str], Path],
    tmp_path: Path,
    full_for: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
):
    full_for("image.png")
    out = tmp_path / "image.png"
    failure(capsys, f"generate {converted_flux('int4') / 'lite'} --prompt a --steps 1 -o {out} -q")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- the system's own


@contextmanager
def file_size_limit(limit: int) -> Generator[None, None, None]:
    """No file grows beyond so many bytes; a write that would is refused with EFBIG, as on a file system of small files.
    (Python ignores the signal that comes with it.)"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept, sys.dont_write_bytecode = (
        sys.dont_write_bytecode,
        True,
    )  # a module's, cut off, would fail every later import
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = kept


@pytest.mark.parametrize(
    "command",
    [
        "convert {model} --effort datafree --rank 16 -o {out}",
        "calibrate {model} --prompts {prompts} --samples 1 --steps 1 --height 32 --width 32 -o {out}",
        "demo --export {out}",
    ],
)
def test_a_write_that_the_system_stops_in_the_middle_leaves_no_part_of_a_file(
    command: str, tiny_flux: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    with file_size_limit(3000):
        error = failure(capsys, command.format(model=tiny_flux, out=out, prompts=prompts) + " -q")
    assert "exceeds the size limit" in error["message"]
    assert not out.exists()
    assert unfinished(tmp_path) == []


def test_a_cache_that_has_no_room_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path))
    with file_size_limit(3000), pytest.raises(OutOfResourcesError, match="exceeds the size") as full:
        locate_source("demo:outliers")
    assert "SVDQ_CACHE" in str(full.value.hint)
    assert (full.value.code, full.value.kind) == (5, "disk-full")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_may_not_be_written_is_named_with_its_cure(tmp_path: Path):
    with (
        pytest.raises(
            EnvironmentLacksError, match="compiled kernels can't be stored there: Read-only"
        ) as lacks,
        atomic.cache_errors(tmp_path, "compiled kernels"),
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert lacks.value.kind == "no-cache"


# ------------------------------------------------------------------------------------------------- the one way to write


def test_a_file_is_whole_under_its_name_or_the_old_one_is_there(tmp_path: Path):
    path = tmp_path / "file"
    atomic.write_text(path, "old")
    with suppress(KeyboardInterrupt), atomic.whole_file(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with atomic.whole_file(path) as partial:
        assert atomic.is_unfinished(partial.name)
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_what_must_survive_a_power_cut_is_synced_and_a_cache_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    synced: list[str] = []

    def note(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", note)
    atomic.write_text(tmp_path / "cache", "x", durable=False)
    with atomic.cached_folder(tmp_path / "folder") as folder:
        (folder / "in a cache").touch()
    assert synced == []
    atomic.write_text(tmp_path / "file", "x")
    assert synced == [f".file.partial-{os.getpid()}", tmp_path.name]
    synced.clear()
    with atomic.whole_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "inside").touch()
    assert synced == ["inside", tmp_path.name]


def test_what_killed_processes_left_is_known_by_its_name(tmp_path: Path):
    (tmp_path / "layers").mkdir()
    for name in (".a.partial-1", "layers/.b.safetensors.partial-77", ".c.old-3"):
        (tmp_path / name).touch()
    kept = {"layers", "layers/b.safetensors", "a.partial-1", ".d.partial"}
    for name in kept - {"layers"}:
        (tmp_path / name).touch()
    atomic.remove_unfinished(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == kept


def test_no_other_module_renames_files_into_place():
    """What would be a second way to write a file whole, or a second spelling of what is unfinished."""
    own = {"storage/atomic.py"}
    package = Path(atomic.__file__).parent.parent
    found = {
        str(path.relative_to(package)): line
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(
            word in line for word in ("os.replace(", "os.rename(", "partial.replace(", '.partial"', "fsync(")
        )
    }
    measures_a_disk = {"conversion/machine_speed.py"}
    keeps_a_log = {"bench/supervise.py"}  # whose lines are each there at once, whatever dies next
    assert found.keys() - own == measures_a_disk | keeps_a_log, found


def test_an_engine_that_can_not_be_compiled_for_want_of_disk_leaves_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full() -> None:
        with atomic.cache_errors(tmp_path, "svdq's CPU engine"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine, "engine", full)
    assert lack_of_engine() is not None
    chosen = choose_backend("auto", torch.device("cpu"), torch.bfloat16)
    assert chosen.name == "reference"
    assert "the disk is full" in chosen.reason
    with pytest.raises(OutOfResourcesError, match="the disk is full"):
        choose_backend("cpu", torch.device("cpu"), torch.bfloat16)


def test_figures_of_a_benchmark_are_not_lost_with_their_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plot = tmp_path / "speed.png"
    monkeypatch.setattr("svdq_cli.bench.plot.write_image", full)
    assert run(["bench", "--shapes", "demo", "--seconds", "0.001", "--plot", str(plot), "--json", "-q"]) == 5
    shown = capsys.readouterr()
    assert json.loads(shown.out)["rows"]
    assert f"{plot}: the disk is full" in shown.err


def test_images_that_no_report_keeps_name_the_folder_of_temporary_files(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluation, "compare_in", full)
    with pytest.raises(OutOfResourcesError, match=tempfile.gettempdir()) as caught:
        evaluation.evaluate(Path("nothing"), default_recipe("demo"))
    assert "TMPDIR" in str(caught.value.hint)
