"""A model in several files: with an index, without one, given by one of them, and in its own repository's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.source import open_source, source_digest
from svdq_cli.source.original_names import FLUX1
from tests.source.originals import original_state


def write_shards(
    folder: Path, tensors: Mapping[str, Tensor], *, stem: str = "diffusion_pytorch_model", count: int = 3
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    files: list[Path] = []
    for number in range(count):
        files.append(folder / f"{stem}-{number + 1:05}-of-{count:05}.safetensors")
        save_file({name: tensors[name] for name in names[number::count]}, files[-1])
    return files


def weights_of(pipeline: Path) -> dict[str, Tensor]:
    return load_file(pipeline / "transformer/diffusion_pytorch_model.safetensors")


@pytest.fixture
def sharded(tiny_flux_copy: Path) -> Path:
    """A pipeline whose transformer is in three shards without an index."""
    write_shards(tiny_flux_copy / "transformer", weights_of(tiny_flux_copy))
    (tiny_flux_copy / "transformer/diffusion_pytorch_model.safetensors").unlink()
    return tiny_flux_copy


def test_a_set_of_shards_needs_no_index(tiny_flux: Path, sharded: Path):
    assert source_digest(open_source(sharded)) == source_digest(open_source(tiny_flux))


def test_a_missing_shard_is_named_by_its_number(sharded: Path):
    (sharded / "transformer/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"of the 3 shards of this model 1 are missing \(number 2\)"
    ) as error:
        open_source(sharded)
    assert error.value.kind == "not-found"


def test_shards_of_two_sets_are_told_apart(sharded: Path, tiny_flux: Path):
    write_shards(sharded / "transformer", weights_of(tiny_flux), count=2)
    with pytest.raises(InputError, match="shards of two different sets, one of 2 and one of 3"):
        open_source(sharded)


def test_one_shard_as_the_source_is_no_damaged_model(sharded: Path):
    shard = sharded / "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
    with pytest.raises(InputError, match="shard 2 of 3") as error:
        open_source(shard)
    assert error.value.kind == "one-shard"
    assert str(sharded / "transformer") in str(error.value.hint)


def test_the_only_shard_is_the_model(tiny_flux: Path, tmp_path: Path):
    (file,) = write_shards(tmp_path, weights_of(tiny_flux), count=1)
    assert source_digest(open_source(file, base=tiny_flux)) == source_digest(open_source(tiny_flux))


def test_an_index_as_the_source_is_its_folder(tiny_flux: Path, sharded: Path, tmp_path: Path):
    tensors = weights_of(tiny_flux)
    files = write_shards(tmp_path, tensors)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: file.name for file in files for name in load_file(file)}})
    )
    assert source_digest(open_source(index, base=tiny_flux)) == source_digest(open_source(tiny_flux))


@pytest.mark.parametrize(
    ("stem", "config"),
    [
        ("flux-finetune", None),
        ("diffusion_pytorch_model", None),
        ("diffusion_pytorch_model", {"_class_name": "Flux", "model_type": "t2i"}),
    ],
    ids=["any name", "diffusers' name", "beside a config of its own"],
)
def test_the_folder_of_an_original_repository_is_the_same_model(
    tiny_flux: Path, tmp_path: Path, stem: str, config: dict[str, str] | None
):
    """Wan's own repositories have shards of original names beside a config.json that is not diffusers'."""
    write_shards(tmp_path, original_state(FLUX1, weights_of(tiny_flux)), stem=stem)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(tmp_path, base=tiny_flux)
    assert source.kind == "3 shards, original (BFL) names"
    assert source_digest(source) == source_digest(open_source(tiny_flux))


def test_a_folder_of_several_models_says_which_files_it_holds(tiny_flux: Path, tmp_path: Path):
    for name in ("ae", "flux1-dev"):
        save_file(weights_of(tiny_flux), tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"ae\.safetensors, flux1-dev\.safetensors") as error:
        open_source(tmp_path, base=tiny_flux)
    assert "give one of these files" in str(error.value.hint)
