"""The recipes that ship with svdq, by name: `flux1-dev-int4` is configs/flux1-dev-int4.yaml, from a wheel too."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from svdq_cli.storage.resources import data_root

SCHEMA_FILE = "recipe.schema.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SCHEMA_LINE = re.compile(r"# yaml-language-server: \$schema=.*\n")


@dataclass(frozen=True, slots=True)
class ShippedRecipe:
    """`about`: its first comment, a sentence."""

    name: str
    path: Path
    about: str


def shipped_recipes() -> tuple[ShippedRecipe, ...]:
    """All of them, by name."""
    files = sorted(data_root("configs").glob("*.yaml"))
    return tuple(ShippedRecipe(file.stem, file, _about(file)) for file in files)


def shipped_recipe(name: str) -> Path | None:
    """The recipe of that name, or of that path under configs/; None where there is none. What has the name in
    the current directory goes before."""
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    if os.path.exists(name) or _NAME.fullmatch(wanted) is None:
        return None
    path = data_root("configs") / f"{wanted}.yaml"
    return path if path.is_file() else None


def names_like(start: str) -> Iterator[str]:
    """The names that begin so, for the completion of a command."""
    return (file.stem for file in sorted(data_root("configs").glob("*.yaml")) if file.stem.startswith(start))


def recipe_like(name: str) -> str | None:
    """The name of a shipped recipe that a mistyped one is close to; None where none is."""
    return next(iter(get_close_matches(name.lower(), list(names_like("")), n=1, cutoff=0.8)), None)


def copied_text(path: Path) -> str:
    """A shipped recipe's text for another place: its first line names the schema where it is installed."""
    text = path.read_text(encoding="utf-8")
    return _SCHEMA_LINE.sub(f"# yaml-language-server: $schema={schema_address()}\n", text, count=1)


def schema_address() -> str:
    """Where editors find the JSON Schema of recipes on this machine."""
    return (data_root("configs") / SCHEMA_FILE).as_uri()


def _about(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    about = next((line for line in comments if not line.startswith("yaml-language-server")), "")
    return re.split(r"(?<=[^\d])\. ", about)[0].rstrip(".")
