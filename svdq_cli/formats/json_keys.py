"""Typed reads from a checkpoint's JSON metadata. Every InputError names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from svdq_cli.errors import InputError


def bad_key(key: str, what: str) -> InputError:
    """The error for `key`, to be raised: `what` continues the sentence."""
    return InputError(f"quantization_config: {key} {what}", where=key)


def json_object(value: object) -> Mapping[str, object] | None:
    """`value` if it is a JSON object, else None."""
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else None


def optional_section(config: Mapping[str, object], key: str) -> Mapping[str, object] | None:
    """The JSON object under `key`, or None where there is none."""
    if config.get(key) is None:
        return None
    section = json_object(config[key])
    if section is None:
        raise bad_key(key, "must be a JSON object")
    return section


def module_paths(section: Mapping[str, object], key: str, *, where: str) -> tuple[str, ...]:
    """The list of at least one module path under `key`; `where` is how the section is called."""
    value = section.get(key)
    items = cast("list[object]", value) if isinstance(value, list) else []
    paths = tuple(item for item in items if isinstance(item, str))
    if not items or len(paths) != len(items):
        raise bad_key(f"{where}.{key}", "must be a list of at least one module path")
    return paths


def whole_number(section: Mapping[str, object], key: str, *, where: str) -> int:
    """The integer under `key`; `where` is how the section is called."""
    value = section.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise bad_key(f"{where}.{key}", "must be a whole number")
    return value
