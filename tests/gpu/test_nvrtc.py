"""NVRTC is found, or what is in its place is named: none, or one that is too old for the kernels."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from svdq_cli.entrypoints.doctor import diagnose
from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.gpu import nvrtc
from tests.gpu.emulation import COMPILER, needs_compiler

OLD = """\
extern "C" int nvrtcVersion(int* major, int* minor) {
    *major = 12;
    *minor = 4;
    return 0;
}
"""
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@pytest.fixture
def old_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only NVRTC of this machine: one of CUDA 12.4, as far as its version goes."""
    source, library = tmp_path / "old.cpp", tmp_path / "libnvrtc.so.12"
    source.write_text(OLD)
    subprocess.run([str(COMPILER), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter([str(library)]))
    nvrtc._library.cache_clear()
    yield library
    nvrtc._library.cache_clear()


@needs_compiler
def test_an_nvrtc_that_is_too_old_is_named_with_the_version_that_is_needed(old_library: Path):
    with pytest.raises(EnvironmentLacksError) as refused:
        nvrtc.version()
    assert refused.value.message.startswith(f"{old_library} is NVRTC 12.4: too old. NVRTC 12.8 or newer")
    assert 'pip install --upgrade "svdq[cuda13]"' in str(refused.value.hint)


@needs_compiler
def test_doctor_says_so_too(old_library: Path):
    (row,) = [test for test in diagnose().tests if test.op == "nvrtc"]
    assert row.status == "unavailable"
    assert f"{old_library} is NVRTC 12.4: too old" in row.detail


@pytest.mark.parametrize(
    ("cuda", "first"), [("12.8", "libnvrtc.so.12"), ("13.0", "libnvrtc.so.13"), (None, "libnvrtc.so.13")]
)
def test_the_compiler_of_torchs_cuda_comes_first(
    cuda: str | None, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A driver of CUDA 12 refuses machine code of a CUDA 13 wheel that lies around."""
    for folder, name in (("cuda_nvrtc", "libnvrtc.so.12"), ("cu13", "libnvrtc.so.13")):
        (tmp_path / folder / "lib").mkdir(parents=True)
        (tmp_path / folder / "lib" / name).touch()
    wheels = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: wheels)
    monkeypatch.setattr(nvrtc.torch.version, "cuda", cuda)
    monkeypatch.setattr(nvrtc.sys, "platform", "linux")
    assert Path(next(nvrtc._candidates())).name == first


def test_no_extra_installs_an_nvrtc_that_is_too_old():
    wheels = re.findall(r'"(nvidia-cuda-nvrtc[\w-]*)>=(\d+)\.(\d+)', PYPROJECT.read_text(encoding="utf-8"))
    assert {name for name, *_ in wheels} == {"nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"}
    for name, major, minor in wheels:
        assert (int(major), int(minor)) >= nvrtc.LEAST_VERSION, name
