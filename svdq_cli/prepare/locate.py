"""From what a user types as SOURCE to a folder on disk: a path, the embedded demo model, or a Hub id."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from svdq_cli import __version__
from svdq_cli.errors import EnvironmentLacksError, InputError
from svdq_cli.prepare.modular_places import COMPONENT_FILES, gathered
from svdq_cli.recipe import find_source, recipe_like, user_path
from svdq_cli.sampling import SAMPLING_FILE
from svdq_cli.source import COMPONENTS
from svdq_cli.source.modular_index import UNUSED_COMPONENTS
from svdq_cli.storage.atomic import cache_errors, cached_folder
from svdq_cli.storage.pipeline_index import INDEXES, is_pipeline
from svdq_cli.storage.resources import cache_folder, demo_model_folder

_OFFLINE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"}
DEMO_SOURCES = ("demo", "demo:outliers")
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# What a conversion reads and copies; single-file duplicates of the weights at a repository's top stay on the Hub.
_HUB_FILES = (
    *INDEXES,
    SAMPLING_FILE,
    "README.md",
    "LICENSE*",
    *(f"*/{kind}" for kind in COMPONENT_FILES),
)


def locate_source(text: str, *, beside: Path | None = None, revision: str | None = None) -> Path:
    """The folder or file a SOURCE means. A Hub id (`owner/name`, `owner/name@revision`) is downloaded, or taken from
    the Hub's cache.

    Raises InputError (kind `not-found`) when it is nowhere.
    """
    if text == "demo":
        return _demo_model()
    if text == "demo:outliers":
        return _outlier_variant()
    found = user_path(find_source(text, beside))
    if os.path.exists(found):
        return gathered(found, fetch=_snapshot)
    if os.path.islink(found):
        raise InputError(
            f"{text}: a link to {os.readlink(found)}, which does not exist",
            hint="restore the target of the link, or give the model's own path",
            where=text,
            kind="not-found",
        )
    if hub := _HUB_ID.fullmatch(text):
        return _from_hub(hub["name"], hub["revision"] or revision)
    meant = recipe_like(text)
    raise InputError(
        f"{text}: no such file or folder",
        hint=f"did you mean the recipe {meant}? svdq recipes lists them all"
        if meant
        else "give a diffusers pipeline folder, a .safetensors or .gguf file, a Hub id such as owner/name, or demo",
        where=text,
        kind="not-found",
    )


def locate_base(text: str, *, beside: Path | None = None) -> Path:
    """The folder of a base pipeline. Of a Hub id all but the diffusion model's weights is fetched."""
    found = user_path(find_source(text, beside))
    hub = _HUB_ID.fullmatch(text)
    if os.path.lexists(found) or hub is None:
        return locate_source(text, beside=beside)
    return _from_hub(hub["name"], hub["revision"], weightless=COMPONENTS)


def locate_file(text: str, *, beside: Path | None = None) -> Path:
    """A file that a recipe names, from the current directory or the recipe's folder; it may be missing."""
    return user_path(find_source(text, beside))


def portable_name(text: str, digest: str, *, beside: Path | None = None) -> str:
    """What a SOURCE is called outside this machine: a Hub id or demo by its name, a file or folder by its content."""
    local = text not in DEMO_SOURCES and os.path.exists(user_path(find_source(text, beside)))
    return f"sha256:{digest}" if local else text


def hub_id(text: str, *, beside: Path | None = None) -> str | None:
    """The `owner/name` of a SOURCE on the Hub, None for any other."""
    found = _HUB_ID.fullmatch(text)
    return found["name"] if found and not os.path.exists(user_path(find_source(text, beside))) else None


def _demo_model() -> Path:
    folder = demo_model_folder()
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder}: the embedded demo model is missing from this installation",
            hint="reinstall svdq from its wheel or a complete clone",
            where=str(folder),
            kind="not-found",
        )
    return folder


def _outlier_variant() -> Path:
    """The stress variant of the demo model, made once per version in svdq's cache."""
    cache = cache_folder()
    folder = cache / f"demo-outliers-{__version__}"
    if not (folder / SAMPLING_FILE).is_file():  # a cache of an older state has none
        from svdq_cli.demo.outliers import export_demo

        shutil.rmtree(folder, ignore_errors=True)
        with cache_errors(cache, "the stress variant"), cached_folder(folder) as partial:
            export_demo(partial, outliers=True)
    return folder


def _from_hub(name: str, revision: str | None, *, weightless: Collection[str] = ()) -> Path:
    """Download a pipeline, or find it in the Hub's cache; without the weights of components that are `weightless`."""
    leave = [f"{component}/*.safetensors" for component in weightless]
    leave += [f"{component}/*" for component in UNUSED_COMPONENTS]
    folder = _snapshot(name, revision, wanted=_HUB_FILES, leave=leave)
    if not is_pipeline(folder) and not (folder / "config.json").is_file():
        raise InputError(
            f"{name}: this repository holds no diffusers pipeline",
            hint="download its .safetensors or .gguf file and give that, with --base for the other parts",
            where=name,
            kind="not-found",
        )
    return gathered(folder, fetch=_snapshot, weightless=weightless)


def _snapshot(name: str, revision: str | None, *, wanted: Sequence[str], leave: Sequence[str] = ()) -> Path:
    """The files of a repository that match `wanted` and not `leave`, downloaded or found in the Hub's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise EnvironmentLacksError(
            f"{name} looks like a Hub id, but huggingface_hub is not installed",
            hint="pip install huggingface_hub, or give a local folder",
        ) from error
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(leave)
            )
        )
    except Exception as error:  # the Hub's client raises many kinds: offline, gated, missing, rate limits
        said = f"{name}@{revision}" if revision else name
        raise InputError(
            f"{said}: not a local path, and not available from the Hub: {_hub_reason(error)}",
            hint=_hub_cure(name, error),
            where=name,
            kind="not-found",
        ) from error


def _hub_reason(error: Exception) -> str:
    """What the Hub client's error means, in words; its own first line for a kind that is not known here."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "its license must be accepted first"
    if "RevisionNotFoundError" in kinds:
        return "there is no such revision"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such repository, or it is private"
    if kinds & _OFFLINE:
        return "it is not in the local Hub cache, and the Hub can't be reached"
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no reason given'}"


def _hub_cure(name: str, error: Exception) -> str:
    """What to do about the Hub client's error. Its kinds are told by name: they have moved between its versions."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"accept the license at https://huggingface.co/{name} and run `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return "check the revision: a branch, a tag or a commit of that repository"
    if "RepositoryNotFoundError" in kinds:
        return "check the name; for a private repository run `hf auth login`"
    if kinds & _OFFLINE:
        return f"run `hf download {name} --local-dir DIR` where there is a connection, and give DIR"
    return "check the name and the connection, or give a local folder"
