"""The index of a modular pipeline: what its components are, and where they are loaded from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

# What no run of svdq needs: a language model that rewrites prompts, which are encoded as they are written, and the
# denoiser of MiniMax-H3 that runs with reference videos alone.
UNUSED_COMPONENTS = ("prompt_upsampler", "prompt_upsampler_processor", "transformer_ref")
_FIELDS = 3  # of an entry: library and class of what was there when it was saved, and how it is loaded


@dataclass(frozen=True, slots=True)
class Place:
    """Where a component is loaded from: a folder or a Hub id, and the folder in it ("" for its top)."""

    where: str
    subfolder: str
    revision: str | None


def own_class(value: object) -> object:
    """[library, class] of an entry of a modular index, by its type hint where it was saved without the component; what
    it is, for any other entry."""
    loading = _loading(value)
    if loading is None:
        return value
    entry = cast("list[object]", value)[:2]
    return entry if entry != [None, None] else list(_hint(loading) or entry)


def place_of(value: object) -> Place | None:
    """Where an entry's component is loaded from unless it is in the pipeline's own folder; None for nowhere."""
    loading = _loading(value) or {}
    where = loading.get("pretrained_model_name_or_path") or loading.get("repo")
    subfolder, revision = loading.get("subfolder"), loading.get("revision")
    if not isinstance(where, str):
        return None
    return Place(
        where,
        subfolder if isinstance(subfolder, str) else "",
        revision if isinstance(revision, str) else None,
    )


def is_left_out(value: object) -> bool:
    """Whether an entry is of a component that the pipeline was saved without, and that is nowhere."""
    return _loading(value) is not None and value[:2] == [None, None] and place_of(value) is None  # type: ignore[index]


def subfolder_of(value: object) -> str | None:
    """The folder, in the pipeline's own, that an entry names for its component; None where it names none."""
    found = (_loading(value) or {}).get("subfolder")
    return found if isinstance(found, str) and found else None


def libraries_of(value: object) -> list[str]:
    """The libraries whose classes an entry of a modular index names: loading the pipeline would import them. Empty for
    any other entry."""
    loading = _loading(value)
    if loading is None:
        return []
    named = [*cast("list[object]", value)[:1], *(_hint(loading) or ())[:1]]
    return [name for name in named if isinstance(name, str)]


def _loading(value: object) -> Mapping[str, Any] | None:
    parts = cast("list[Any]", value) if isinstance(value, list) else []
    return parts[2] if len(parts) == _FIELDS and isinstance(parts[2], dict) else None


def _hint(loading: Mapping[str, Any]) -> tuple[str, str] | None:
    hint = loading.get("type_hint")
    right = isinstance(hint, list) and len(hint) == 2 and all(isinstance(part, str) for part in hint)
    return (hint[0], hint[1]) if right else None  # type: ignore[index]


def index_of_copy(
    index: Mapping[str, object], components: Collection[str], repository: str | None = None
) -> dict[str, object]:
    """`index` with the `components` of a copy in it (folders of the same name), loaded from the Hub's `repository`, or
    from the folder alone. Left as it is, a copy on the Hub would load the original's weights without a word."""

    def entry(name: str, value: object) -> object:
        loading = _loading(value)
        if name not in components or loading is None:
            return value
        place = {
            "pretrained_model_name_or_path": repository,
            "revision": None,
            "subfolder": name,
            "variant": None,
        }
        # what an older release called the first of them would be read in its place
        kept = {key: each for key, each in loading.items() if key != "repo"}
        return [*cast("list[object]", value)[:2], {**kept, **place}]

    return {name: entry(name, value) for name, value in index.items()}
