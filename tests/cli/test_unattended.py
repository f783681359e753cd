"""A conversion in a script with no terminal: what a CI job relies on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from svdq_cli import __version__
from svdq_cli.cli import run
from svdq_cli.cli.streams import prepare_streams
from svdq_cli.entrypoints.inspect import inspect_checkpoint

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
    ("told", "code", "kind"), [("SIGTERM", 75, "interrupted"), ("SIGINT", 130, "canceled")]
)
def test_a_signal_before_the_work_begins_is_told_apart_too(told: str, code: int, kind: str, moment: str):
    program = (
        "import os, signal, sys\n"
        # a shell starts what it puts into the background with Ctrl-C ignored, and children inherit that
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"tell = lambda: os.kill(os.getpid(), signal.{told})\n"
        f"{moment}"
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


def test_closed_streams_lead_nowhere(monkeypatch: pytest.MonkeyPatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    prepare_streams()
    for name in ("stdout", "stderr"):
        with getattr(sys, name) as stream:
            stream.write("not read by anyone")
