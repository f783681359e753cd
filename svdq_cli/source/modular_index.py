"""The index of a copy of a modular pipeline: components come from the copy, not from where the original had them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast


def index_of_copy(
    index: Mapping[str, object], components: Collection[str], repository: str | None = None
) -> dict[str, object]:
    """`index` with the `components` of a copy in it (folders of the same name), loaded from the Hub's `repository`, or
    from the folder alone. Left as it is, a copy on the Hub would load the original's weights without a word."""

    def entry(name: str, value: object) -> object:
        parts = cast("list[Any]", value) if isinstance(value, list) else []
        if name not in components or len(parts) != 3 or not isinstance(parts[2], dict):
            return value
        place = {
            "pretrained_model_name_or_path": repository,
            "revision": None,
            "subfolder": name,
            "variant": None,
        }
        return [*parts[:2], {**parts[2], **place}]

    return {name: entry(name, value) for name, value in index.items()}
