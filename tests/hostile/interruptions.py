"""A conversion that dies or finds the disk full at any of its points: nothing wrong under a final name, and --resume
ends with the bytes of a run that nobody disturbed.

    python -m tests.hostile.interruptions 50        # 50 points of each kind; Linux, a disk of its own needs root or
                                                    # user namespaces

The points are the moments at which the conversion opens a file to write, makes, renames or removes something. Each is
tried in a child of this process: killed with SIGKILL, or with a disk that a file of ballast has just filled.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch

from svdq_cli.cli import run
from tests.tiny import tiny_flux_pipeline

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DISK_BYTES = 64 << 20
_RECIPE = """\
version: 1
model: {{source: {source}}}
quantization: {{effort: datafree, rank: 16}}
outputs:
  - {{format: nunchaku-lite, path: {there}/folder}}
  - {{format: comfy, path: {there}/file.safetensors}}
"""


class Trial:
    """A place for conversions of one model, and what they should leave there."""

    def __init__(self, source: Path, there: Path) -> None:
        self.there = there
        self.recipe = there.with_suffix(".yaml")
        self.recipe.write_text(_RECIPE.format(source=source, there=there))
        self.outputs = (there / "folder", there / "file.safetensors")
        there.mkdir()
        self.points = self._count()
        self.expected = self.found()
        assert set(self.expected) == set(self.outputs)
        self.clear()

    def found(self) -> dict[Path, str]:
        """The outputs that stand under their names, by a digest of all but the reports, which tell times."""
        return {path: _digest(path) for path in self.outputs if os.path.lexists(path)}

    def clear(self) -> None:
        for path in self.there.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def at(self, point: int, act: Callable[[], None], *options: str) -> int:
        """Run in a child with `act` called at its n-th point. Returns the exit code, -9 for a killed one."""
        return _in_child(lambda: self._convert(point, act, options))

    def resume(self) -> int:
        return _in_child(lambda: self._convert(None, _nothing, ("--resume",)))

    def _count(self) -> int:
        """The points of an undisturbed run."""
        count = self.there.with_suffix(".points")
        code = _in_child(lambda: self._convert(None, _nothing, (), count))
        assert code == 0, code
        return int(count.read_text())

    def _convert(
        self, point: int | None, act: Callable[[], None], options: Sequence[str], count: Path | None = None
    ) -> int:
        passed = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal passed
            if _changes_disk(event, arguments, str(self.there)):
                passed += 1
                if passed == point:
                    act()

        sys.addaudithook(hook)
        code = run(["convert", str(self.recipe), "--json", "-q", *options])
        if count is not None:
            count.write_text(str(passed))
        return code


def killed_at(trial: Trial, point: int) -> str:
    """What was found under the final names; raises AssertionError for anything wrong."""
    code = trial.at(point, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert code == -signal.SIGKILL, code
    return _judged(trial, "killed")


def full_at(trial: Trial, point: int) -> str:
    ballast = trial.there / "ballast"
    code = trial.at(point, lambda: _fill(ballast))
    assert code in (0, 5), code
    ballast.unlink(missing_ok=True)
    return _judged(trial, "disk full" if code else "finished before the disk was needed")


def _judged(trial: Trial, what: str) -> str:
    found = trial.found()
    assert found.items() <= trial.expected.items(), f"{what}: another file under the final name"
    code = trial.resume()
    assert code == 0 or (code == 2 and found == trial.expected), f"{what}: can't be gone on with"
    assert trial.found() == trial.expected
    beside = [Path(f"{trial.outputs[1]}.{name}") for name in ("report.json", "README.md")]
    left = sorted(path.name for path in trial.there.iterdir() if path not in (*trial.outputs, *beside))
    assert not left, f"{what}: left {left}"
    trial.clear()
    return what


# ------------------------------------------------------------------------------------------------- small pieces


def _changes_disk(event: str, arguments: tuple[object, ...], there: str) -> bool:
    match event, arguments:
        case "open", (str() as path, _, int() as flags):
            return path.startswith(there) and bool(flags & _WRITES)
        case (("os.rename" | "os.mkdir" | "os.remove" | "os.rmdir" | "shutil.copyfile"), (*_, _)):
            return any(there in str(argument) for argument in arguments)
        case _:
            return False


def _nothing() -> None:
    pass


def _fill(ballast: Path) -> None:
    """Take what the disk has left, to the last byte."""
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(b"x")


def _in_child(work: Callable[[], int]) -> int:
    """The exit code of a forked child, as `subprocess` tells it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                code = work()
        except BaseException:  # a bug; the parent sees the exit code, who reads along the reason
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.name not in ("svdq_report.json", "README.md"):
            digest.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def own_disk(folder: Path) -> None:
    """Mount a small disk of memory at `folder`, seen by this process and its children only. OSError where that is not
    allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(
        b"none", b"/", None, 0x44000, None
    ):  # CLONE_NEWNS; MS_REC | MS_PRIVATE
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={DISK_BYTES}".encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def spread(points: int, wanted: int) -> list[int]:
    """`wanted` of the points 1 to `points`, the first and the last among them; the last ten, where outputs get their
    names, are worth half of them."""
    late = max(1, points - 9)
    early, last = wanted - wanted // 2, wanted // 2
    before = (1 + round(step * (late - 2) / max(1, early - 1)) for step in range(early))
    naming = (late + round(step * (points - late) / max(1, last - 1)) for step in range(last))
    return sorted({*before, *naming})


def main(words: list[str]) -> None:
    wanted = int(words[0])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        source = tiny_flux_pipeline(folder / "source")
        (folder / "disk").mkdir()
        try:
            own_disk(folder / "disk")
            attempts = {"SIGKILL": killed_at, "disk full": full_at}
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            print("a full disk is not tried: mounting one needs root or user namespaces")
            attempts = {"SIGKILL": killed_at}
        trial = Trial(source, folder / "disk" / "there")
        for kind, attempt in attempts.items():
            for point in spread(trial.points, wanted):
                print(f"{kind} at point {point} of {trial.points}: {attempt(trial, point)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
