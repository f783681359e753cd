"""Every family's model is the same model as a single file, under diffusers' names and under its original ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.planning.inventory import take_inventory
from svdq_cli.source import Source, only, open_source, source_digest
from svdq_cli.source.names import Naming
from svdq_cli.source.original_names import NAMINGS
from tests.source.originals import original_state
from tests.tiny_families import PIPELINES, tiny_pipeline


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(request.param, tmp_path_factory.mktemp("family") / request.param)


def state_of(source: Source) -> dict[str, Tensor]:
    return {name: tensor for file in source.files for name, tensor in load_file(file).items()}


def first_denoiser(pipeline: Path) -> Source:
    """What a file holds of a pipeline, which may have two."""
    source = open_source(pipeline)
    return only(source, [source.component])


def assert_same_model(file: Path, base: Path) -> None:
    folder, single = first_denoiser(base), open_source(file, base=base)
    assert take_inventory(single, None).state.keys() == single.tensors.keys()
    assert (single.component, source_digest(single)) == (folder.component, source_digest(folder))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["bare", "comfyui"])
def test_diffusers_names(pipeline: Path, tmp_path: Path, prefix: str):
    state = state_of(first_denoiser(pipeline))
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert_same_model(tmp_path / "model.safetensors", pipeline)


ORIGINAL = ["sdxl", "sd15", "pixart", "sana", "sana-1.5", "sana-sprint", "sd3", "z-image"]


@pytest.mark.parametrize("pipeline", [*ORIGINAL, "flux2", "chroma", "wan"], indirect=True)
def test_original_names(pipeline: Path, tmp_path: Path):
    source = open_source(pipeline)
    naming = next(n for n in NAMINGS if n.model_class == source.config["_class_name"])
    write_original(naming, state_of(source), tmp_path / "model.safetensors")
    assert_same_model(tmp_path / "model.safetensors", pipeline)


def write_original(naming: Naming, state: dict[str, Tensor], out: Path) -> None:
    prefix = "model.diffusion_model."
    save_file({prefix + name: tensor for name, tensor in original_state(naming, state).items()}, out)
