"""Modular pipelines whose index has components from elsewhere: gathered in one folder of links, in svdq's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from svdq_cli.errors import InputError
from svdq_cli.recipe import user_path
from svdq_cli.source.modular_index import UNUSED_COMPONENTS, Place, index_of_copy, place_of, subfolder_of
from svdq_cli.storage.atomic import cache_errors, cached_folder
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.pipeline_index import MODULAR_INDEX, is_modular
from svdq_cli.storage.resources import cache_folder

# What a component's folder is read for: nothing else is taken from where an index leads
COMPONENT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_CONFIGS = ("config.json", "*_config.json")


class Fetch(Protocol):
    """The local folder of a repository's files that match `wanted` and not `leave`."""

    def __call__(self, name: str, revision: str | None, *, wanted: Sequence[str]) -> Path: ...


def gathered(folder: Path, *, fetch: Fetch, weightless: Collection[str] = ()) -> Path:
    """A modular pipeline with all its components in it: `folder` itself where they are, else a folder of links.

    The index says of each component which folder or Hub repository has it. A component in the pipeline's own folder
    comes first, as with diffusers. Of those that are `weightless` no weights are fetched. Any other folder is returned
    as it is. Raises InputError (kind `not-found`) that names the component and the cure.
    """
    if not is_modular(folder):
        return folder
    index = read_json(folder / MODULAR_INDEX)
    found = _components(folder, index, fetch, weightless)
    if all(path == folder / name for name, path in found.items()):
        return folder
    return _linked(folder, index, found)


def _components(
    folder: Path, index: Mapping[str, object], fetch: Fetch, weightless: Collection[str]
) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, value in index.items():
        if not _is_folder_name(name):  # a component's is refused where the index is read
            continue
        own = _own_folder(folder, name, value)
        place = place_of(value)
        if own is not None:
            found[name] = own
        elif place is not None and name not in UNUSED_COMPONENTS:
            found[name] = _elsewhere(folder, name, place, fetch, weightless=name in weightless)
    return found


def _own_folder(folder: Path, name: str, value: object) -> Path | None:
    """The component's folder in the pipeline's own, by the component's name or what the index calls it."""
    called = subfolder_of(value)
    names = [name] if called is None or not _leads_down(called) else [called, name]
    return next((folder / each for each in names if (folder / each).is_dir()), None)


def _is_folder_name(name: str) -> bool:
    return not name.startswith("_") and name == Path(name).name


def _leads_down(subfolder: str) -> bool:
    path = Path(subfolder)
    return not path.is_absolute() and ".." not in path.parts


def _elsewhere(folder: Path, name: str, place: Place, fetch: Fetch, *, weightless: bool) -> Path:
    """A component's folder, where the index says: on this machine, or from the Hub."""
    if not _leads_down(place.subfolder):
        raise _refused(folder, name, place, f"whose folder {place.subfolder!r} leads out of it")
    for root in (user_path(place.where), folder / place.where):
        if root.is_file():
            raise _refused(folder, name, place, "one file: only a component's folder can be read")
        if root.is_dir():
            return _checked(folder, name, place, root / place.subfolder)
    if Path(place.where).is_absolute() or place.where.count("/") != 1:
        raise _refused(folder, name, place, "which does not exist")
    below = f"{place.subfolder}/" if place.subfolder else ""
    kinds = [kind for kind in COMPONENT_FILES if not (weightless and kind == "*.safetensors")]
    try:
        root = fetch(place.where, place.revision, wanted=[f"{below}{kind}" for kind in kinds])
    except InputError as error:
        raise InputError(
            f"{folder}: component {name!r} comes from {error.message}",
            hint=_hub_hint(error, place, folder / name),
            where=str(folder / name),
            kind="not-found",
        ) from error
    return _checked(folder, name, place, root / place.subfolder)


def _hub_hint(error: InputError, place: Place, own: Path) -> str:
    if "hf download" not in (error.hint or ""):
        return f"{error.hint}, or put the component's folder at {own}"
    included = f" --include '{place.subfolder}/*'" if place.subfolder else ""
    got = f"DIR/{place.subfolder}" if place.subfolder else "DIR"
    run = f"hf download {place.where}{included} --local-dir DIR"
    return f"run `{run}` where there is a connection, and put {got} at {own}"


def _checked(folder: Path, name: str, place: Place, found: Path) -> Path:
    """What an index leads to, where it is a component: a folder of anything else would be copied into outputs."""
    if any(fnmatch(file.name, kind) for kind in _CONFIGS for file in _files(found)):
        return found
    raise _refused(folder, name, place, f"where no component is: {found}")


def _refused(folder: Path, name: str, place: Place, said: str) -> InputError:
    return InputError(
        f"{folder}: component {name!r} comes from {place.where!r}, {said}",
        hint=f"put the component's folder at {folder / name}, or correct its place in {MODULAR_INDEX}",
        where=str(folder / name),
        kind="not-found",
    )


def _files(component: Path) -> list[Path]:
    """A component's files that are read, by name; empty where there is no such folder."""
    if not component.is_dir():
        return []
    return sorted(
        file
        for file in component.iterdir()
        if file.is_file() and any(fnmatch(file.name, kind) for kind in COMPONENT_FILES)
    )


def _linked(folder: Path, index: Mapping[str, object], found: Mapping[str, Path]) -> Path:
    """The pipeline as a folder of links, made once for these files at these places."""
    own = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name != MODULAR_INDEX]
    links = {file.name: file.resolve() for file in own}
    for name, component in found.items():
        if component.parent == folder:
            links[name] = component.resolve()
        else:
            links |= {f"{name}/{file.name}": file.absolute() for file in _files(component)}
    says = {"index": {**index}, "links": {name: str(target) for name, target in links.items()}}
    digest = hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]
    cache = cache_folder()
    gathered = cache / f"modular-{folder.resolve().name}-{digest}"
    if not gathered.is_dir():
        with cache_errors(cache, "the links to a pipeline's components"), cached_folder(gathered) as partial:
            for name, target in links.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).symlink_to(target)
            text = json.dumps(index_of_copy(index, found), indent=2)
            (partial / MODULAR_INDEX).write_text(f"{text}\n", encoding="utf-8")
    return gathered
