"""A whole checkpoint's own text encoders and autoencoder take the place of the base pipeline's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError
from svdq_cli.inference.load import load_16bit_pipeline
from svdq_cli.recipe import default_recipe, with_overrides
from svdq_cli.source import Source, open_source
from svdq_cli.source.companion_names import LDM_VAE, OPEN_CLIP
from svdq_cli.source.names import convert_names
from svdq_cli.source.original_names import FLUX1, LDM_UNET
from tests.source.originals import MemoryTensor, original_state, row_numbers
from tests.source.test_single_file import weights_of
from tests.tiny_families import tiny_pipeline

CLIP_L = "conditioner.embedders.0.transformer."
CLIP_G = "conditioner.embedders.1.model."


# ------------------------------------------------------------------------------------------------- names


def test_the_autoencoder_s_names_are_those_of_diffusers():
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        model = AutoencoderKL(**config)  # type: ignore[arg-type]
    state = row_numbers({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    original = original_state(LDM_VAE, state)
    assert "decoder.up.3.block.2.conv1.weight" in original
    assert_converted(LDM_VAE.name, original, state)
    expected = theirs.convert_ldm_vae_checkpoint(
        {f"first_stage_model.{name}": tensor for name, tensor in original.items()}, config
    )
    assert_equal(expected, state)


def test_open_clip_s_names_are_those_of_diffusers():
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=64, num_hidden_layers=3, projection_dim=64)
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Stand-ins with a width: diffusers cuts the fused matrix along rows that it counts by the projection's size
    state = {
        name: rows[:, None].expand(-1, 64).clone() if len(shapes[name]) > 1 else rows
        for name, rows in row_numbers(shapes).items()
    }
    original = original_state(OPEN_CLIP, state)
    assert "transformer.resblocks.2.attn.in_proj_weight" in original
    assert_converted(OPEN_CLIP.name, original, state)
    expected = theirs.convert_open_clip_checkpoint(
        model, {CLIP_G + name: t for name, t in open_clip(state).items()}, prefix=CLIP_G
    )
    assert_equal(expected, state)


def assert_converted(name: str, original: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    naming = {LDM_VAE.name: LDM_VAE, OPEN_CLIP.name: OPEN_CLIP}[name]
    converted, unknown = convert_names(
        naming, {key: MemoryTensor(tensor) for key, tensor in original.items()}
    )
    assert unknown == ()
    assert_equal({key: entry.read() for key, entry in converted.items()}, state)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# ------------------------------------------------------------------------------------------------- whole checkpoints


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("sdxl", tmp_path_factory.mktemp("base") / "sdxl")


def component(folder: Path, name: str) -> dict[str, Tensor]:
    return {k: t for file in (folder / name).glob("*.safetensors") for k, t in load_file(file).items()}


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under OpenCLIP's names, which has its projection bare and transposed."""
    named = original_state(OPEN_CLIP, state)
    projection = named.pop("text_projection.weight", None)
    return named if projection is None else named | {"text_projection": projection.T.contiguous()}


def sdxl_checkpoint(folder: Path, out: Path) -> Path:
    """The pipeline as one LDM file, every weight of its text encoders and autoencoder moved by training."""
    trained = {name: moved(component(folder, name)) for name in ("vae", "text_encoder", "text_encoder_2")}
    vae = original_state(LDM_VAE, trained["vae"])
    for name, tensor in vae.items():
        if ".mid.attn_1." in name and tensor.ndim == 2:
            vae[name] = tensor[:, :, None, None]
    clip_g = open_clip(trained["text_encoder_2"])
    file = {
        **{
            f"model.diffusion_model.{n}": t
            for n, t in original_state(LDM_UNET, component(folder, "unet")).items()
        },
        **{f"first_stage_model.{n}": t for n, t in vae.items()},
        **{
            f"{CLIP_L}text_model.{n.removeprefix('text_model.')}": t
            for n, t in trained["text_encoder"].items()
        },
        **{CLIP_G + n: t for n, t in clip_g.items()},
        f"{CLIP_L}text_model.embeddings.position_ids": torch.arange(77)[None],
        f"{CLIP_G}logit_scale": torch.tensor(4.6),
    }
    save_file({name: tensor.contiguous() for name, tensor in file.items()}, out)
    return out


def moved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * 1.5 for name, tensor in state.items()}


@pytest.fixture(scope="module")
def source(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(
        sdxl_checkpoint(base, tmp_path_factory.mktemp("whole") / "finetune.safetensors"), base=base
    )


def test_an_sdxl_checkpoint_brings_its_own_text_encoders_and_autoencoder(source: Source, base: Path):
    assert sorted(source.companions) == ["text_encoder", "text_encoder_2", "vae"]
    assert source.kind == "single file, LDM names, with its own text_encoder, text_encoder_2, vae"
    assert source.warnings == ()
    for name, entries in source.companions.items():
        expected = moved(component(base, name))
        assert all(entry.shape == expected[key].shape for key, entry in entries.items())
        assert_equal({key: entry.read() for key, entry in entries.items()}, expected)


def test_they_are_written_into_the_output(source: Source, base: Path, tmp_path: Path):
    recipe = with_overrides(
        default_recipe(str(source.path)),
        {"model.base": str(base), "quantization.effort": "datafree", "quantization.rank": 16},
    )
    convert(recipe, tmp_path / "out")
    for name in source.companions:
        assert_equal(component(tmp_path / "out", name), moved(component(base, name)))
        assert (tmp_path / "out" / name / "config.json").read_bytes() == (
            base / name / "config.json"
        ).read_bytes()


def test_calibration_generates_with_them(source: Source, base: Path):
    pipe = load_16bit_pipeline(source, class_name="UNet2DConditionModel", device=torch.device("cpu"))
    for name in source.companions:
        found = getattr(pipe, name).state_dict()
        for key, tensor in moved(component(base, name)).items():
            own = key if key in found else key.removeprefix("text_model.")
            assert torch.equal(found[own], tensor.float())


def test_a_text_encoder_of_another_size_stays_the_base_s(base: Path, tmp_path: Path, source: Source):
    state = load_file(source.path)
    name = f"{CLIP_L}text_model.final_layer_norm.weight"
    state[name] = torch.zeros(3, dtype=state[name].dtype)
    save_file(state, tmp_path / "other.safetensors")
    opened = open_source(tmp_path / "other.safetensors", base=base)
    assert sorted(opened.companions) == ["text_encoder_2", "vae"]
    assert "text_encoder of" in opened.warnings[0]
    assert "has final_layer_norm.weight of [3] (the base's is of [" in opened.warnings[0]


def test_flux_s_t5_is_taken_from_a_comfyui_checkpoint(tiny_flux: Path, tmp_path: Path):
    t5 = moved(component(tiny_flux, "text_encoder_2"))
    model = original_state(FLUX1, weights_of(tiny_flux))
    prefix = "text_encoders.t5xxl.transformer."
    file = {f"model.diffusion_model.{n}": t for n, t in model.items()} | {
        prefix + n: t for n, t in t5.items()
    }
    save_file(file, tmp_path / "all.safetensors")
    opened = open_source(tmp_path / "all.safetensors", base=tiny_flux)
    assert_equal({n: e.read() for n, e in opened.companions["text_encoder_2"].items()}, t5)


def test_a_base_without_weights_of_a_part_keeps_the_file_s_part_out(
    base: Path, tmp_path: Path, source: Source
):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    for file in (copy / "vae").glob("*.safetensors"):
        file.unlink()
    opened = open_source(source.path, base=copy)
    assert "vae" not in opened.companions
    assert "first_stage_model" in opened.warnings[0]


# ------------------------------------------------------------------------------------------------- in fewer bits


def flux_with_t5(base: Path, t5: Mapping[str, Tensor], out: Path) -> Path:
    model = original_state(FLUX1, weights_of(base))
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in model.items()}
    save_file(file | {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5.items()}, out)
    return out


def in_8_bits(state: Mapping[str, Tensor], *, scaled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """As ComfyUI stores text encoders, with its marker; and the same numbers at 16 bits."""
    eight: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if scaled else {}
    sixteen: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            eight[name] = sixteen[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448 if scaled else torch.tensor(1.0)
        eight[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        sixteen[name] = (eight[name].float() * scale).bfloat16()
        if scaled:
            eight[name.removesuffix("weight") + "scale_weight"] = scale.reshape(())
    return eight, sixteen


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_a_t5_that_is_the_base_s_in_8_bits_stays_the_base_s(tiny_flux: Path, tmp_path: Path, scaled: bool):
    eight, _ = in_8_bits(component(tiny_flux, "text_encoder_2"), scaled=scaled)
    opened = open_source(flux_with_t5(tiny_flux, eight, tmp_path / "all.safetensors"), base=tiny_flux)
    assert opened.companions == {}
    (warning,) = opened.warnings
    assert "the text_encoder_2 of" in warning
    assert "the same one in 8 bits" in warning


@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_a_t5_of_its_own_in_8_bits_is_unscaled_and_said(tiny_flux: Path, tmp_path: Path, scaled: bool):
    trained = moved(component(tiny_flux, "text_encoder_2"))
    eight, sixteen = in_8_bits(trained, scaled=scaled)
    opened = open_source(flux_with_t5(tiny_flux, eight, tmp_path / "all.safetensors"), base=tiny_flux)
    assert_equal({name: entry.read() for name, entry in opened.companions["text_encoder_2"].items()}, sixteen)
    (warning,) = opened.warnings
    assert warning.startswith("text_encoder_2: ")
    assert "8-bit floats" in warning


def test_a_base_in_8_bits_itself_is_no_better_than_the_file(tiny_flux_copy: Path, tmp_path: Path):
    eight, sixteen = in_8_bits(component(tiny_flux_copy, "text_encoder_2"), scaled=False)
    file = flux_with_t5(tiny_flux_copy, eight, tmp_path / "all.safetensors")
    save_file(eight, tiny_flux_copy / "text_encoder_2/model.safetensors")
    opened = open_source(file, base=tiny_flux_copy)
    assert_equal({name: entry.read() for name, entry in opened.companions["text_encoder_2"].items()}, sixteen)


def mxfp8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """8-bit floats with an exponent of their own for every 32 in a row, which ComfyUI's label names."""
    layer = name.removesuffix("weight")
    return {
        name: tensor.to(torch.float8_e4m3fn),
        layer + "weight_scale": torch.full((tensor.shape[0], tensor.shape[1] // 32), 127, dtype=torch.uint8),
        layer + "comfy_quant": torch.frombuffer(bytearray(b'{"format": "mxfp8"}'), dtype=torch.uint8),
    }


@pytest.mark.parametrize(
    ("quantized", "name"),
    [
        (mxfp8, "ComfyUI mxfp8"),
        (
            lambda name, tensor: {name: tensor.to(torch.int8), f"{name}_scale": tensor[:, :1].clone()},
            "stored as I8",
        ),
        (lambda name, tensor: {f"{name}_packed": tensor.int()}, "compressed-tensors"),
    ],
    ids=["mxfp8", "int8", "compressed-tensors"],
)
def test_a_t5_that_svdq_can_t_read_stays_the_base_s_by_name(
    tiny_flux: Path, tmp_path: Path, quantized: Callable[[str, Tensor], dict[str, Tensor]], name: str
):
    t5: dict[str, Tensor] = {}
    for key, tensor in component(tiny_flux, "text_encoder_2").items():
        t5 |= quantized(key, tensor) if ".SelfAttention.q." in key else {key: tensor}
    opened = open_source(flux_with_t5(tiny_flux, t5, tmp_path / "all.safetensors"), base=tiny_flux)
    assert opened.companions == {}
    (warning,) = opened.warnings
    assert name in warning
    assert "the text_encoder_2 of" in warning


def test_two_keys_for_one_tensor_of_a_text_encoder_are_an_error_that_names_both(
    base: Path, tmp_path: Path, source: Source
):
    state = load_file(source.path)
    norm = "final_layer_norm.weight"
    state[f"{CLIP_L}_orig_mod.text_model.{norm}"] = state[f"{CLIP_L}text_model.{norm}"].clone()
    save_file(state, tmp_path / "twice.safetensors")
    with pytest.raises(InputError, match=rf"{CLIP_L}.*{norm} and {CLIP_L}.*{norm} both map to") as caught:
        open_source(tmp_path / "twice.safetensors", base=base)
    assert caught.value.kind == "claimed-twice"
