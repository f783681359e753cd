"""A conversion in a script with no terminal: what a CI job relies on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from svdq_cli import __version__
from svdq_cli.cli import run, stop_cleanly
from svdq_cli.cli.streams import prepare_streams
from svdq_cli.entrypoints.inspect import inspect_checkpoint
from svdq_cli.errors import Terminated

ROOT = Path(__file__).resolve().parents[2]


def ran(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "svdq_cli", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=300,
    )


def test_stdout_is_one_object_stderr_is_plain_and_provenance_is_complete(tiny_flux: Path, tmp_path: Path):
    out = tmp_path / "out"
    words = ("convert", str(tiny_flux), "-o", str(out), "--effort", "datafree", "--rank", "16", "--seed", "7")
    done = ran(*words, "--json", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert done.stderr
    assert all(byte >= 32 or byte == 10 for byte in done.stderr), done.stderr
    assert report["provenance"].keys() == {
        *("svdq_version", "versions", "source_sha256", "calibration_sha256", "loras_sha256")
    }
    assert report["provenance"]["svdq_version"] == __version__
    assert report["provenance"]["versions"]["torch"] == version("torch")
    assert report["provenance"]["versions"]["diffusers"] == version("diffusers")
    assert report["provenance"]["source_sha256"] == report["model"]["source_sha256"]
    assert report["recipe"]["quantization"]["seed"] == 7
    stored = inspect_checkpoint(out).provenance
    assert stored is not None
    assert {key: stored[key] for key in report["provenance"]} == report["provenance"]
    assert stored["recipe"]["quantization"]["seed"] == 7  # type: ignore[index]


WHILE_IT_IS_IMPORTED = """
class Teller:
    def find_spec(self, name, path=None, target=None):
        if name == "svdq_cli.cli.app":
            tell()
sys.meta_path.insert(0, Teller())
"""
BEFORE_THE_WORK = """
import svdq_cli.entrypoints.doctor
svdq_cli.entrypoints.doctor.diagnose = tell
"""


@pytest.mark.parametrize("moment", [WHILE_IT_IS_IMPORTED, BEFORE_THE_WORK])
@pytest.mark.parametrize(
    ("told", "code", "kind"),
    [("SIGTERM", 75, "interrupted"), ("SIGHUP", 75, "interrupted"), ("SIGINT", 130, "canceled")],
)
def test_a_signal_before_the_work_begins_is_told_apart_too(told: str, code: int, kind: str, moment: str):
    program = (
        "import os, signal, sys\n"
        # a shell starts what it puts into the background with Ctrl-C ignored, nohup with SIGHUP; children inherit that
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"tell = lambda *_: os.kill(os.getpid(), signal.{told})\n"
        f"{moment}"
        # who is impatient sends it once more, while the failure is said
        "import svdq_cli.reports\n"
        "as_json = svdq_cli.reports.json_text\n"
        "svdq_cli.reports.json_text = lambda report: [tell(), as_json(report)][1]\n"
        "sys.argv = ['svdq', 'doctor', '--json']\n"
        "from svdq_cli.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, timeout=300
    )
    assert done.returncode == code
    assert json.loads(done.stdout)["error"]["kind"] == kind
    assert b"Traceback" not in done.stderr


def test_a_closed_terminal_stops_no_command_that_nohup_started():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop_cleanly()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop_cleanly()
        with pytest.raises(Terminated, match="SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_bug_is_exit_code_1_with_its_traceback_and_one_object_on_stdout():
    program = (
        "import sys, svdq_cli.entrypoints.doctor\n"
        "svdq_cli.entrypoints.doctor.diagnose = lambda: 1 / 0\n"
        "from svdq_cli.cli import run\n"
        "sys.exit(run(['doctor', '--json']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, timeout=300
    )
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"], error["kind"]) == (1, 1, "bug")
    assert b"ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("words", ["", " --json"])
def test_a_reader_that_has_seen_enough_changes_no_exit_code(
    words: str, tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`svdq ... | head -1`, under `set -o pipefail` too."""
    command = (
        f"convert {tiny_flux} -o {tmp_path / 'out'} --effort datafree --rank 16 -q --fail-if size_ratio<50"
    )
    for text, code in ((f"inspect {tiny_flux}", 0), (command, 6), (command, 2)):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert run((text + words).split()) == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["", " --json"])
def test_a_result_that_could_not_be_printed_is_exit_code_5(
    words: str, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(f"inspect {tiny_flux}{words}".split()) == 5
    assert "stdout: No space left on device" in capsys.readouterr().err


def broken_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("led", [broken_pipe, full_disk])
def test_progress_that_nobody_reads_stops_no_conversion(
    led: Callable[[], int],
    tiny_flux: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """`svdq ... 2>&1 | head`, a terminal that is gone, a log or events on a full disk."""
    words = (
        f"convert {tiny_flux} -o {tmp_path / 'out'} --effort datafree --rank 16 --events /dev/full".split()
    )
    with capsys.disabled(), open(led(), "w", encoding="utf-8") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(sys, "stdout", stdout := open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        prepare_streams()
        assert run(words) == 0
        stdout.close()
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_a_log_of_events_that_is_lost_is_said_once(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = (
        f"convert {tiny_flux} -o {tmp_path / 'out'} --effort datafree --rank 16 --events /dev/full".split()
    )
    assert run(words) == 0
    assert capsys.readouterr().err.count("/dev/full: events are no longer written there") == 1


def test_a_connection_that_breaks_is_no_reader_that_has_seen_enough(
    tiny_flux: Path, monkeypatch: pytest.MonkeyPatch
):
    def inspect(*_: object, **__: object) -> None:
        raise BrokenPipeError("of a socket")

    monkeypatch.setattr("svdq_cli.entrypoints.inspect.inspect_source", inspect)
    with pytest.raises(BrokenPipeError, match="of a socket"):
        run(["inspect", str(tiny_flux)])


def test_help_that_nobody_reads_to_its_end_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    with open(broken_pipe(), "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        prepare_streams()
        assert run(["--help"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_failure_keeps_its_exit_code_where_stdout_can_not_take_it(monkeypatch: pytest.MonkeyPatch):
    with open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run(["inspect", "nothing-here", "--json"]) == 3


def test_closed_streams_lead_nowhere(monkeypatch: pytest.MonkeyPatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    prepare_streams()
    for name in ("stdout", "stderr"):
        with getattr(sys, name) as stream:
            stream.write("not read by anyone")
