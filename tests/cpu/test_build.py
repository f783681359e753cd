"""Which instruction set is taken, how the engine is compiled, and what is said where it can't be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svdq_cli.cpu import build, engine
from svdq_cli.cpu.build import Compiler, built_library, find_compiler
from svdq_cli.cpu.instruction_sets import (
    BY_NAME,
    CHOICE,
    INSTRUCTION_SETS,
    _linux_features,
    all_here,
    best_here,
    best_of,
)
from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.inference.backend import choose_backend

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """Whatever a test finds is not kept for the others."""
    caches = (find_compiler, engine.engine, engine.engine_for)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def no_compiler(nothing_loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ("fma f16c avx2 avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16 avx_vnni", "avx512-bf16"),
        ("fma f16c avx2 avx512f avx512bw avx512vl avx512dq avx512_vnni", "avx512-vnni"),
        ("fma f16c avx2 avx512f avx512bw avx512vl avx512dq", "avx2"),  # Skylake's AVX-512
        ("fma f16c avx2 avx_vnni", "avx-vnni"),
        ("fp asimd asimddp", "neon-dotprod"),
        ("fp asimd asimddp i8mm", "neon-i8mm"),
        ("sse2", "scalar"),
        ("", "scalar"),
    ],
)
def test_a_processor_gets_the_best_instruction_set_it_has(features: str, name: str):
    assert best_of(features.split()).name == name


def test_linux_tells_the_features_of_both_architectures():
    assert _linux_features("processor: 0\nflags\t\t: fpu avx2 fma\n\nprocessor: 1\n") == {
        "fpu",
        "avx2",
        "fma",
    }
    assert _linux_features("processor : 0\nFeatures\t: fp asimd asimddp\n") == {"fp", "asimd", "asimddp"}
    assert _linux_features("nothing of the kind") == frozenset()


def test_another_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, "avx2")
    assert best_here().name == "avx2"
    monkeypatch.setenv(CHOICE, "sse9")
    with pytest.raises(UsageError, match="SVDQ_CPU_ISA=sse9: no such instruction set"):
        best_here()


def test_every_machine_has_an_instruction_set():
    assert all_here()[-1].name == "scalar"
    assert set(all_here()) <= set(INSTRUCTION_SETS)


@needs_compiler
def test_the_engine_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = built_library(BY_NAME["scalar"], cache=tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name], "nothing else is left"
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert built_library(BY_NAME["scalar"], cache=tmp_path) == path


@pytest.mark.parametrize("command", ["g++", "gcc", "clang++", "clang"])
def test_the_engine_brings_the_libraries_that_it_needs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """peft sets `CXX` to gcc when a BOFT adapter is made; gcc does not link C++'s library by itself, and torch has it
    loaded in some processes and not in others."""
    if shutil.which(command) is None:
        pytest.skip(f"needs {command}")
    monkeypatch.setattr(build, "find_compiler", lambda: Compiler((command,), command))
    path = built_library(BY_NAME["scalar"], cache=tmp_path)
    program = f"import ctypes; ctypes.CDLL({str(path)!r})"
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_compiler_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = Compiler((sys.executable, "-c", "import sys; sys.exit('fatal error: no space')"), "broken")
    monkeypatch.setattr(build, "find_compiler", lambda: broken)
    with pytest.raises(
        EnvironmentLacksError, match="could not compile svdq's CPU engine: fatal error: no space"
    ):
        built_library(BY_NAME["scalar"], cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build, "find_compiler", lambda: Compiler(("g++",), "any"))
    with pytest.raises(EnvironmentLacksError, match="svdq's CPU engine can't be stored there") as refused:
        built_library(BY_NAME["scalar"], cache=tmp_path / "file" / "cpu")
    assert refused.value.hint == "set SVDQ_CACHE to a folder that you may write to"


def test_without_a_compiler_plain_torch_runs_and_says_how_to_get_the_engine(no_compiler: None):
    found = choose_backend("auto", CPU, torch.bfloat16)
    assert found.name == "reference"
    assert found.reason == (
        "plain torch on cpu: no C++ compiler was found for svdq's CPU engine; "
        'install a C++ compiler (g++ or clang++), or pip install "svdq[cpu]"'
    )
    with pytest.raises(EnvironmentLacksError, match="no C\\+\\+ compiler was found"):
        choose_backend("cpu", CPU, torch.bfloat16)


def test_the_compiler_that_the_environment_names_comes_first(
    nothing_loaded: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", f"{sys.executable} -O1")
    found = find_compiler()
    assert found is not None
    assert found.command == (sys.executable, "-O1")


@needs_compiler
def test_auto_takes_the_engine_on_a_cpu_and_says_which():
    found = choose_backend("auto", CPU, torch.bfloat16)
    assert (found.name, found.reason) == ("cpu", f"svdq's CPU engine, {best_here().name}")


def test_the_engine_is_not_for_gpus():
    with pytest.raises(EnvironmentLacksError, match="the CPU engine can't run on cuda"):
        choose_backend("cpu", torch.device("cuda"), torch.bfloat16)
