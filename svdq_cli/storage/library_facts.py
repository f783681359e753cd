"""What diffusers says of a class, kept in the user's cache: to import diffusers takes longer than all else that a look
at a model does.

An entry holds for the code that it was made with: the versions of what takes part, and size and time of every file of
diffusers and of svdq that was loaded. Nothing is taken or kept but inside of `kept_library_facts`, which only commands
that look at a model enter, and only in processes that have not imported diffusers: a program may have changed it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, cast

from svdq_cli import __version__
from svdq_cli.storage.atomic import write_text
from svdq_cli.storage.resources import cache_folder
from svdq_cli.system.machine import resident_ram

Kind = Literal["inventory", "shapes", "call", "guidance", "autoencoder", "encoder"]

_MOST_ENTRIES = 100  # the oldest go; one has about 100 kB
_PACKAGES = ("diffusers", "svdq_cli")  # whose loaded files an entry holds for
_LIBRARIES = ("diffusers", "torch", "peft", "transformers", "accelerate")


@dataclass(frozen=True, slots=True)
class Cost:
    """What it takes to ask the library."""

    seconds: float = 0.0  # of the processor
    bytes: int = 0  # of memory, that stay


@dataclass
class _Store:
    open: bool = False
    spared: Cost = Cost()


_store = _Store()


@contextmanager
def kept_library_facts() -> Generator[None, None, None]:
    """Inside, `library_fact` takes facts from the cache and keeps new ones there."""
    before = _store.open
    _store.open = before or "diffusers" not in sys.modules
    _store.spared = Cost()
    try:
        yield
    finally:
        _store.open = before


def spared_cost() -> Cost:
    """What the library would have taken that was not asked since `kept_library_facts` was entered: a conversion, which
    asks it, takes that besides."""
    return Cost() if "diffusers" in sys.modules else _store.spared


def library_fact(kind: Kind, about: Sequence[str], ask: Callable[[], object]) -> object:
    """What `ask` returns (JSON, tuples as lists): from the cache, or asked and kept there.

    `about`: everything that the fact depends on besides the code. What `ask` raises is not kept.
    """
    if not _store.open:
        return _as_json(ask())
    file = _file(kind, about)
    if (entry := _read(file)) is not None:
        taken = cast("Mapping[str, float]", entry["cost"])
        spared = _store.spared
        # each of them with the import, of which there is one
        _store.spared = Cost(max(spared.seconds, taken["seconds"]), max(spared.bytes, int(taken["bytes"])))
        return entry["fact"]
    started, held = time.process_time(), resident_ram()
    fact = _as_json(ask())
    cost = {"seconds": time.process_time() - started, "bytes": max(0, resident_ram() - held)}
    _keep(file, {"fact": fact, "cost": cost})
    return fact


def _as_json(value: object) -> object:
    """As it would come from the cache."""
    return json.loads(json.dumps(value))


def _file(kind: Kind, about: Sequence[str]) -> Path:
    key = json.dumps([kind, *about, __version__, sys.version, *_environment()])
    return cache_folder() / "library" / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@cache
def _environment() -> tuple[str, ...]:
    """The libraries' versions, and which diffusers it is that would be imported."""
    spec = importlib.util.find_spec("diffusers")
    return (str(spec and spec.origin), *(f"{name} {_version(name)}" for name in _LIBRARIES))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _loaded_files() -> dict[str, list[int]]:
    """Size and time of every loaded file of `_PACKAGES`."""
    names = [name for name in sys.modules if name.split(".")[0] in _PACKAGES]
    files = {getattr(sys.modules[name], "__file__", None) for name in names}
    return {file: _stamp(file) for file in sorted(file for file in files if isinstance(file, str))}


def _stamp(file: str) -> list[int]:
    facts = os.stat(file)
    return [facts.st_size, facts.st_mtime_ns]


def _read(file: Path) -> dict[str, object] | None:
    """A whole entry whose code is as it was; None for anything else."""
    try:
        digest, _, text = file.read_text(encoding="utf-8").partition("\n")
        if digest != hashlib.sha256(text.encode()).hexdigest():
            return None
        entry = json.loads(text)
        return entry if all(_stamp(name) == stamp for name, stamp in entry["files"].items()) else None
    except (OSError, ValueError):
        return None


def _keep(file: Path, entry: Mapping[str, object]) -> None:
    """A cache that can't be written is none; nor is what code said whose files are gone, or in an archive, kept."""
    try:
        text = json.dumps({**entry, "files": _loaded_files()})
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", durable=False)
        entries = sorted(file.parent.glob("*.json"), key=lambda entry: entry.stat().st_mtime, reverse=True)
        for old in entries[_MOST_ENTRIES:]:
            old.unlink(missing_ok=True)
    except OSError:
        return
