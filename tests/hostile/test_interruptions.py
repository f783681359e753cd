"""A sample of what `python -m tests.hostile.interruptions` does, in a process of its own: it forks and mounts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and mounts a disk of its own: needs Linux")
def test_killed_or_out_of_disk_a_conversion_leaves_nothing_wrong_and_can_be_gone_on_with():
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.interruptions", "3"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SIGKILL at point") == 3
