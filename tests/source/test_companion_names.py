"""Text encoders of whole checkpoints under every name that they have there, told apart from the base's by training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from svdq_cli.source import open_source
from svdq_cli.source.companions import PROJECTION
from svdq_cli.source.names import Naming
from svdq_cli.source.original_names import LDM_UNET, SD3
from tests.source.originals import original_state
from tests.source.test_companions import CLIP_G, assert_equal, component, moved, open_clip
from tests.tiny_families import tiny_pipeline

State = Mapping[str, Tensor]
Stored = Callable[[State], dict[str, Tensor]]


def wrapped(state: State) -> dict[str, Tensor]:
    """As transformers before 5.6 saved it: with the wrapper's name, but for the projection."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": tensor
        for name, tensor in state.items()
    }


def bare(state: State) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def unprojected(state: State) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in wrapped(state).items() if name != PROJECTION}


def stability_2(state: State) -> dict[str, Tensor]:
    """As in Stable Diffusion 2: OpenCLIP's names, one layer more than diffusers uses, and a projection that it does not
    use."""
    named = open_clip(wrapped(state))
    last = max(int(name.split(".")[2]) for name in named if ".resblocks." in name)
    spare = {
        name.replace(f".{last}.", f".{last + 1}."): tensor + 1
        for name, tensor in named.items()
        if f".resblocks.{last}." in name
    }
    width = len(named["ln_final.weight"])
    return named | spare | {"text_projection": torch.rand(width, width)}


def open_clip_with_linear(state: State) -> dict[str, Tensor]:
    """OpenCLIP's names but for the projection, which some tools store as transformers does, not transposed."""
    named = open_clip(wrapped(state))
    projection = named.pop("text_projection")
    return named | {PROJECTION: projection.T.contiguous()}


SD1, SD2 = "cond_stage_model.transformer.", "cond_stage_model.model."
SD3_L, SD3_G = "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."
CASES: dict[str, tuple[str, Naming, str, str, Stored]] = {
    "SD 1.x": ("sd15", LDM_UNET, "text_encoder", SD1, wrapped),
    "SD 1.x, older": ("sd15", LDM_UNET, "text_encoder", SD1, bare),
    "SD 2.x": ("sd15", LDM_UNET, "text_encoder", SD2, stability_2),
    "SDXL, CLIP-G": ("sdxl", LDM_UNET, "text_encoder_2", CLIP_G, lambda state: open_clip(wrapped(state))),
    "SDXL, CLIP-G, transformers": ("sdxl", LDM_UNET, "text_encoder_2", CLIP_G, wrapped),
    "SDXL, CLIP-G, linear": ("sdxl", LDM_UNET, "text_encoder_2", CLIP_G, open_clip_with_linear),
    "SD3, CLIP-L": ("sd3", SD3, "text_encoder", SD3_L, wrapped),
    "SD3, CLIP-G": ("sd3", SD3, "text_encoder_2", SD3_G, wrapped),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny_pipeline(name, folder / name) for name in ("sd15", "sdxl", "sd3")}


def whole(base: Path, naming: Naming, parts: State, out: Path) -> Path:
    """A checkpoint of the base's diffusion model with these tensors next to it."""
    denoiser = "transformer" if (base / "transformer").is_dir() else "unet"
    model = original_state(naming, component(base, denoiser))
    file = {**{f"model.diffusion_model.{name}": tensor for name, tensor in model.items()}, **parts}
    save_file({name: tensor.contiguous().clone() for name, tensor in file.items()}, out)
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_trained_text_encoder_takes_the_base_s_place(case: str, bases: dict[str, Path], tmp_path: Path):
    family, naming, name, prefix, stored = CASES[case]
    base = bases[family]
    trained = moved(component(base, name))
    parts = {prefix + key: tensor for key, tensor in stored(trained).items()}
    source = open_source(whole(base, naming, parts, tmp_path / "whole.safetensors"), base=base)
    assert source.warnings == ()
    assert sorted(source.companions) == [name]
    assert_equal({key: entry.read() for key, entry in source.companions[name].items()}, trained)


# Those that diffusers' own single-file loader knows
THEIRS = ("SD 1.x", "SD 2.x", "SDXL, CLIP-G", "SD3, CLIP-L", "SD3, CLIP-G")


@pytest.mark.parametrize("case", THEIRS)
def test_what_is_read_is_what_diffusers_loads_of_the_same_file(
    case: str, bases: dict[str, Path], tmp_path: Path
):
    family, naming, name, prefix, stored = CASES[case]
    base = bases[family]
    trained = moved(component(base, name))
    if case == "SD3, CLIP-L":
        # which diffusers always gives the identity for a projection
        trained[PROJECTION] = torch.eye(len(trained[PROJECTION]), dtype=trained[PROJECTION].dtype)
    parts = {prefix + key: tensor for key, tensor in stored(trained).items()}
    file = whole(base, naming, parts, tmp_path / "whole.safetensors")
    model_class = CLIPTextModelWithProjection if PROJECTION in trained else CLIPTextModel
    loaded = theirs.create_diffusers_clip_model_from_ldm(
        model_class, load_file(file), subfolder=name, config=str(base), local_files_only=True
    )
    entries = open_source(file, base=base).companions[name]
    found = {key.removeprefix("text_model."): entry.read() for key, entry in entries.items()}
    expected = {key.removeprefix("text_model."): tensor for key, tensor in loaded.state_dict().items()}
    assert_equal(found, {key: tensor.to(found[key].dtype) for key, tensor in expected.items()})


def test_sd3_s_clip_l_without_a_projection_has_the_identity(bases: dict[str, Path], tmp_path: Path):
    base = bases["sd3"]
    trained = moved(component(base, "text_encoder"))
    parts = {SD3_L + key: tensor for key, tensor in unprojected(trained).items()}
    source = open_source(whole(base, SD3, parts, tmp_path / "whole.safetensors"), base=base)
    found = {key: entry.read() for key, entry in source.companions["text_encoder"].items()}
    size = len(trained[PROJECTION])
    assert_equal(found, trained | {PROJECTION: torch.eye(size, dtype=trained[PROJECTION].dtype)})


def test_another_clip_without_its_projection_stays_the_base_s_and_it_is_said_why(
    bases: dict[str, Path], tmp_path: Path
):
    base = bases["sdxl"]
    trained = moved(component(base, "text_encoder_2"))
    parts = {CLIP_G + key: tensor for key, tensor in unprojected(trained).items()}
    source = open_source(whole(base, LDM_UNET, parts, tmp_path / "whole.safetensors"), base=base)
    assert source.companions == {}
    assert f"has the text_encoder_2 of {base}, not the file's, which lacks {PROJECTION}" in source.warnings[0]


def test_positions_that_an_old_base_stores_need_not_be_in_the_file(bases: dict[str, Path], tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(bases["sd15"], base)
    weights = base / "text_encoder/model.safetensors"
    trained = moved(load_file(weights))
    save_file(load_file(weights) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, weights)
    parts = {SD1 + key: tensor for key, tensor in wrapped(trained).items()}
    source = open_source(whole(base, LDM_UNET, parts, tmp_path / "whole.safetensors"), base=base)
    found = {
        key.removeprefix("text_model."): entry.read()
        for key, entry in source.companions["text_encoder"].items()
    }
    assert_equal(found, bare(trained))
