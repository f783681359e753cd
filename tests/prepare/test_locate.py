"""What a user types as SOURCE: a path, a hub id with or without a revision (from the hub's cache: no network)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError
from svdq_cli.prepare.locate import locate_base, locate_source, portable_name
from svdq_cli.recipe import default_recipe, with_overrides
from svdq_cli.source import open_source
from tests.source.test_single_file import WEIGHTS, bfl_file

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40


@pytest.fixture
def hub_cache(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one repository: its branch main, and a tag v1 whose weights are twice as large."""
    root = tmp_path / "hub"
    repository = root / "models--someone--tiny-flux"
    for commit in (COMMIT, OLD_COMMIT):
        for file in tiny_flux.rglob("*"):
            if file.is_file():
                target = repository / "snapshots" / commit / file.relative_to(tiny_flux)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
    old = repository / "snapshots" / OLD_COMMIT / WEIGHTS
    save_file({name: 2 * tensor for name, tensor in load_file(old).items()}, old)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    (repository / "refs/v1").write_text(OLD_COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _from(root))
    return root


def _from(root: Path) -> Callable[..., str]:
    """The client's own function, with the cache folder said: its default is bound when the module is imported."""
    original = huggingface_hub.snapshot_download

    def download(name: str, **options: Any) -> str:
        return original(name, cache_dir=root, local_files_only=True, **options)

    return download


def test_a_hub_id_is_the_cached_snapshot_of_its_main_branch(hub_cache: Path):
    assert locate_source("someone/tiny-flux").name == COMMIT


@pytest.mark.parametrize("text", ["someone/tiny-flux@v1", f"someone/tiny-flux@{OLD_COMMIT}"])
def test_a_revision_is_written_behind_the_id(hub_cache: Path, text: str):
    assert locate_source(text).name == OLD_COMMIT


def test_the_recipe_s_revision_is_used(hub_cache: Path):
    assert locate_source("someone/tiny-flux", revision="v1").name == OLD_COMMIT


def test_a_hub_id_converts_like_its_folder_and_keeps_its_name(hub_cache: Path, tmp_path: Path):
    recipe = with_overrides(
        default_recipe("someone/tiny-flux@v1"), {"quantization.effort": "datafree", "quantization.rank": 16}
    )
    report = convert(recipe, tmp_path / "out")
    assert report.read_as == "diffusers folder"
    header = (tmp_path / "out" / WEIGHTS).read_bytes()[:20000]
    assert b"someone/tiny-flux@v1" in header
    assert str(tmp_path).encode() not in header


def test_a_base_may_be_a_hub_id(hub_cache: Path, tiny_flux: Path, tmp_path: Path):
    file = bfl_file(tiny_flux, tmp_path / "model.safetensors")
    assert open_source(file, base=locate_base("someone/tiny-flux")).pipeline == locate_source(
        "someone/tiny-flux"
    )


def test_a_base_is_fetched_without_the_model_s_own_weights(monkeypatch: pytest.MonkeyPatch, tiny_flux: Path):
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tiny_flux)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locate_base("someone/tiny-flux@v2")
    assert (asked["name"], asked["revision"]) == ("someone/tiny-flux", "v2")
    assert "transformer/*.safetensors" in asked["ignore_patterns"]  # type: ignore[operator]


def test_offline_the_cure_is_to_download_elsewhere(hub_cache: Path):
    with pytest.raises(InputError, match="nobody/nothing: not a local path, and not available") as caught:
        locate_source("nobody/nothing")
    assert caught.value.kind == "not-found"
    assert "hf download nobody/nothing --local-dir DIR" in str(caught.value.hint)


def test_offline_is_said_in_words_and_not_by_the_client_s_exception(hub_cache: Path):
    with pytest.raises(InputError) as caught:
        locate_source("owner/nothing")
    assert "the Hub can't be reached" in caught.value.message
    assert "Error" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        (errors.GatedRepoError, "accept the license at https://huggingface.co/someone/gated"),
        (errors.RevisionNotFoundError, "check the revision"),
        (errors.RepositoryNotFoundError, "check the name"),
        (TimeoutError, "or give a local folder"),
    ],
)
def test_each_refusal_of_the_hub_has_its_cure(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], cure: str
):
    def refuse(name: str, **options: object) -> str:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        locate_source("someone/gated")
    assert cure in str(caught.value.hint)


def test_a_repository_of_single_files_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    with pytest.raises(InputError, match="holds no diffusers pipeline") as caught:
        locate_source("someone/files")
    assert "--base" in str(caught.value.hint)


def test_a_local_path_is_embedded_by_content_only(tiny_flux: Path):
    assert portable_name(str(tiny_flux), "0123") == "sha256:0123"
    assert portable_name("demo", "0123") == "demo"
    assert portable_name("owner/name@v1", "0123") == "owner/name@v1"


def test_the_same_weights_under_other_folders_are_the_same_bytes(
    tiny_flux: Path, tiny_flux_copy: Path, tmp_path: Path
):
    for name, folder in (("a", tiny_flux), ("b", tiny_flux_copy)):
        config = folder / "transformer/config.json"
        if name == "b":  # where it was saved from says nothing of the model
            config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "/elsewhere"}))
        convert(
            with_overrides(
                default_recipe(str(folder)), {"quantization.effort": "datafree", "quantization.rank": 16}
            ),
            tmp_path / name,
        )
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
