"""Every family's model is the same model as a single file, under diffusers' names and under its original ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.planning.inventory import take_inventory
from svdq_cli.source import Source, only, open_source, source_digest
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


# What else lies in files of a class: markers of every spelling, below the prefix and on top, and other components
EMPTY = torch.zeros(0)
BESIDE = {
    "vae.decoder.conv_in.weight": torch.zeros(2, 2),
    "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(2, 2, dtype=torch.uint8),
}
MARKERS = {
    "UNet2DConditionModel": {"v_pred": EMPTY, "ztsnr": EMPTY, "alphas_cumprod": torch.rand(1000)},
}
INNER = {
    "QwenImageTransformer2DModel": {"__index_timestep_zero__": EMPTY},
}


def write_variant(source: Source, state: dict[str, Tensor], prefix: str, out: Path) -> None:
    """The model below a prefix; where that is one, with all that may lie there and beside it."""
    model_class = str(source.config["_class_name"])
    inner = {"scaled_fp8": EMPTY, "step_count": torch.tensor(7)} if prefix else {}
    if source.config.get("zero_cond_t"):
        inner |= INNER.get(model_class, {})
    beside = {**BESIDE, **MARKERS.get(model_class, {})} if prefix else {}
    model = {prefix + name: tensor for name, tensor in {**state, **inner}.items()}
    save_file({**model, **beside}, out)


PREFIXES = ["", "model.diffusion_model.", "base_model.model._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES, ids=["bare", "comfyui", "wrapped"])
def test_diffusers_names(pipeline: Path, tmp_path: Path, prefix: str):
    source = first_denoiser(pipeline)
    write_variant(source, state_of(source), prefix, tmp_path / "model.safetensors")
    assert_same_model(tmp_path / "model.safetensors", pipeline)


ORIGINAL = ["sdxl", "sd15", "pixart", "sana", "sana-1.5", "sana-sprint", "sd3", "z-image"]


@pytest.mark.parametrize("prefix", PREFIXES, ids=["bare", "comfyui", "wrapped"])
@pytest.mark.parametrize("pipeline", [*ORIGINAL, "flux2", "chroma", "wan"], indirect=True)
def test_original_names(pipeline: Path, tmp_path: Path, prefix: str):
    source = open_source(pipeline)
    naming = next(n for n in NAMINGS if n.model_class == source.config["_class_name"])
    state = original_state(naming, state_of(source))
    write_variant(source, state, prefix, tmp_path / "model.safetensors")
    assert_same_model(tmp_path / "model.safetensors", pipeline)
