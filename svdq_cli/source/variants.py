"""Weights that a folder holds as a variant (`diffusion_pytorch_model.fp16.safetensors`), as many on the Hub do."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.storage.json_files import read_json

WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
# diffusers has written the shards of a variant in two ways
_VARIANT = re.compile(
    rf"({'|'.join(WEIGHT_NAMES)})"
    r"(?:\.(?P<first>\w+)(?P<before>-\d+-of-\d+)?\.safetensors"
    r"|(?P<after>-\d+-of-\d+)\.(?P<last>\w+)\.safetensors"
    r"|\.safetensors\.index\.(?P<index>\w+)\.json)"
)
_PLAIN = re.compile(rf"({'|'.join(WEIGHT_NAMES)})(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_PREFERRED = ("fp32", "bf16", "fp16")  # of several, the most exact


def chosen_variant(folder: Path) -> str | None:
    """The variant that a component is read from; None where its weights are there without one, or not at all.

    Raises InputError (kind `variant-only`) where there are several, and it can't be told which one is meant.
    """
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    found = sorted({name for file in names if (name := variant_of(file)) is not None})
    if not found or any(_PLAIN.fullmatch(name) for name in names):
        return None
    if len(found) == 1:
        return found[0]
    for wanted in _PREFERRED:
        if wanted in found:
            return wanted
    raise InputError(
        f"{folder}: the weights exist only as several variants ({', '.join(found)})",
        hint=f"remove all but one of them, or rename the one that is meant to {_first_plain(names, found[0])}",
        where=str(folder),
        kind="variant-only",
    )


def variant_files(folder: Path, variant: str) -> tuple[Path, ...]:
    """The safetensors files of a variant."""
    files = sorted(folder.glob("*.safetensors"))
    return tuple(file for file in files if variant_of(file.name) == variant)


def spare_files(names: Collection[str], variant: str | None) -> set[str]:
    """Of a component's files, the variants that are not read."""
    return {name for name in names if variant_of(name) not in (None, variant)}


def without_variant(folder: Path) -> None:
    """Give the weights of a component that are there only as a variant their plain names, under which every library
    finds them."""
    variant = chosen_variant(folder)
    if variant is None:
        return
    for file in sorted(folder.iterdir()):
        if variant_of(file.name) != variant:
            continue
        plain = file.with_name(_plain_name(file.name))
        file.rename(plain)
        if plain.suffix == ".json":
            index = read_json(plain)
            shards = index.get("weight_map")
            names = shards.items() if isinstance(shards, dict) else ()
            renamed = {str(key): _plain_name(str(name)) for key, name in names}
            plain.write_text(json.dumps({**index, "weight_map": renamed}, indent=2) + "\n", encoding="utf-8")


def variant_of(name: str) -> str | None:
    """`fp16` of `diffusion_pytorch_model.fp16.safetensors`; None for a file that is not of a variant."""
    found = _VARIANT.fullmatch(name)
    return (found["first"] or found["last"] or found["index"]) if found else None


def _plain_name(name: str) -> str:
    found = _VARIANT.fullmatch(name)
    if found is None:
        return name
    if found["index"]:
        return f"{found[1]}.safetensors.index.json"
    return f"{found[1]}{found['before'] or found['after'] or ''}.safetensors"


def _first_plain(names: Collection[str], variant: str) -> str:
    return next(_plain_name(name) for name in names if variant_of(name) == variant)
