"""Whatever file the weights come in, under whatever names, the same weights become the same checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError
from svdq_cli.recipe import default_recipe, with_overrides
from svdq_cli.source import Source, open_source, read_header, read_tensor, source_digest, tensors
from svdq_cli.source.original_names import FLUX1
from svdq_cli.source.tensors import Rows, RowsTensor, content_sha256
from tests.source.originals import original_state

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
MODEL_PREFIX = "model.diffusion_model."


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def bfl_file(folder: Path, out: Path) -> Path:
    save_file(original_state(FLUX1, weights_of(folder)), out)
    return out


def diffusers_file(folder: Path, out: Path) -> Path:
    save_file(weights_of(folder), out, metadata={"format": "pt"})
    return out


def comfy_file(folder: Path, out: Path) -> Path:
    """A whole ComfyUI checkpoint: the model below its prefix, text encoder and autoencoder beside it."""
    model = {
        MODEL_PREFIX + name: tensor for name, tensor in original_state(FLUX1, weights_of(folder)).items()
    }
    beside = {
        "vae.decoder.conv_in.weight": torch.zeros(2, 2),
        "text_encoders.t5xxl.shared.weight": torch.ones(2),
    }
    save_file({**model, **beside}, out)
    return out


def float8_files(folder: Path, out: Path, *, scaled: bool, dtype: torch.dtype) -> tuple[Path, Path]:
    """A BFL file whose matrices are 8-bit floats, and the same values up-converted by hand."""
    eight: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=dtype)} if scaled else {}
    reference: dict[str, Tensor] = {}
    for name, tensor in original_state(FLUX1, weights_of(folder)).items():
        if tensor.ndim < 2:
            eight[name] = reference[name] = tensor
            continue
        scale = tensor.float().abs().max() / torch.finfo(dtype).max if scaled else torch.tensor(1.0)
        eight[name] = (tensor.float() / scale).to(dtype)
        reference[name] = (eight[name].float() * scale).to(torch.bfloat16)
        if scaled:
            eight[name.replace(".weight", ".scale_weight")] = scale.reshape(())
            eight[name.replace(".weight", ".scale_input")] = torch.tensor(1.0)
    save_file(eight, out.with_suffix(".fp8.safetensors"))
    save_file(reference, out)
    return out.with_suffix(".fp8.safetensors"), out


def converted_bytes(source: Path, base: Path | None, out: Path) -> bytes:
    """The weight file of a data-free conversion."""
    recipe = with_overrides(
        default_recipe(str(source)),
        {
            "quantization.effort": "datafree",
            "quantization.rank": 16,
            "model.base": str(base) if base else None,
        },
    )
    convert(recipe, out)
    return (out / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def from_folder(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return converted_bytes(tiny_flux, None, tmp_path_factory.mktemp("folder") / "out")


@pytest.mark.parametrize("write", [bfl_file, diffusers_file, comfy_file])
def test_a_single_file_becomes_the_same_bytes_as_the_folder(
    tiny_flux: Path, tmp_path: Path, from_folder: bytes, write: Callable[[Path, Path], Path]
):
    file = write(tiny_flux, tmp_path / "model.safetensors")
    assert converted_bytes(file, tiny_flux, tmp_path / "out") == from_folder
    assert source_digest(open_source(file, base=tiny_flux)) == source_digest(open_source(tiny_flux))
    assert check(tmp_path / "out", against=open_source(file, base=tiny_flux)).status == "ok"


def test_the_other_components_come_from_the_base(tiny_flux: Path, tmp_path: Path):
    file = bfl_file(tiny_flux, tmp_path / "model.safetensors")
    converted_bytes(file, tiny_flux, tmp_path / "out")
    for part in ("model_index.json", "vae/config.json", "text_encoder_2/model.safetensors"):
        assert (tmp_path / "out" / part).read_bytes() == (tiny_flux / part).read_bytes()


def test_a_base_needs_no_weights_of_the_model_itself(
    tiny_flux_copy: Path, tmp_path: Path, from_folder: bytes
):
    file = bfl_file(tiny_flux_copy, tmp_path / "model.safetensors")
    (tiny_flux_copy / WEIGHTS).unlink()
    assert converted_bytes(file, tiny_flux_copy, tmp_path / "out") == from_folder


def test_calibration_of_a_single_file_generates_with_the_base(tiny_flux: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    file = bfl_file(tiny_flux, tmp_path / "model.safetensors")
    weights: list[bytes] = []
    for name, source, base in (("folder", tiny_flux, None), ("file", file, str(tiny_flux))):
        recipe = with_overrides(
            default_recipe(str(source)),
            {
                "quantization.effort": "fast",
                "quantization.smoothing": "closed-form",
                "quantization.rank": 16,
                "calibration.prompts": str(prompts),
                "calibration.samples": 2,
                "calibration.steps": 2,
                "calibration.height": 32,
                "calibration.width": 32,
                "model.base": base,
            },
        )
        assert not convert(recipe, tmp_path / name).data_free
        weights.append((tmp_path / name / WEIGHTS).read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_float8_becomes_what_its_upconverted_reference_becomes(
    tiny_flux: Path, tmp_path: Path, scaled: bool, dtype: torch.dtype
):
    eight, reference = float8_files(tiny_flux, tmp_path / "twin.safetensors", scaled=scaled, dtype=dtype)
    source = open_source(eight, base=tiny_flux)
    assert source_digest(source) == source_digest(open_source(reference, base=tiny_flux))
    assert "8-bit floats and were up-converted to bfloat16" in source.warnings[0]
    first = converted_bytes(eight, tiny_flux, tmp_path / "a")
    assert first == converted_bytes(reference, tiny_flux, tmp_path / "b")


def test_float8_with_a_scale_per_row_and_comfyui_s_labels(tiny_flux: Path, tmp_path: Path):
    state = weights_of(tiny_flux)
    weight = state["proj_out.weight"].float()
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    label = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    state["proj_out.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    save_file(
        {**state, "proj_out.weight_scale": scale, "proj_out.comfy_quant": label}, tmp_path / "m.safetensors"
    )
    source = open_source(tmp_path / "m.safetensors", base=tiny_flux)
    expected = (state["proj_out.weight"].float() * scale).bfloat16()
    assert torch.equal(read_tensor(source, "proj_out.weight"), expected)


def test_a_folder_of_float8_is_upconverted_too(tiny_flux_copy: Path):
    state = weights_of(tiny_flux_copy)
    eight = {n: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for n, t in state.items()}
    save_file(eight, tiny_flux_copy / WEIGHTS)
    source = open_source(tiny_flux_copy)
    assert torch.equal(read_tensor(source, "proj_out.weight"), eight["proj_out.weight"].bfloat16())


def test_what_else_lies_in_the_file_is_said(tiny_flux: Path, tmp_path: Path):
    source = open_source(comfy_file(tiny_flux, tmp_path / "all.safetensors"), base=tiny_flux)
    assert source.kind == "single file, original (BFL) names"
    vae, text = source.warnings
    assert f"the output has the vae of {tiny_flux}, not the file's, which lacks" in vae
    assert f"also holds text_encoders (1 tensor); the output takes these from {tiny_flux}" in text


def test_what_no_output_has_is_not_said_to_be_the_base_s(tiny_flux: Path, tmp_path: Path):
    file = {MODEL_PREFIX + n: t for n, t in original_state(FLUX1, weights_of(tiny_flux)).items()} | {
        "model_ema.decay": torch.zeros(1),
        "model_ema.num_updates": torch.zeros(1),
        "denoiser.sigmas": torch.zeros(1000),
    }
    save_file(file, tmp_path / "ema.safetensors")
    (warning,) = open_source(tmp_path / "ema.safetensors", base=tiny_flux).warnings
    assert "also holds denoiser (1 tensor), model_ema (2 tensors); not part of the pipeline" in warning
    assert str(tiny_flux) not in warning


# ------------------------------------------------------------------------------------------------- configs


def test_without_a_base_an_unpublished_shape_says_what_is_missing(tiny_flux: Path, tmp_path: Path):
    with pytest.raises(InputError, match="can't be derived from its names and shapes") as caught:
        open_source(bfl_file(tiny_flux, tmp_path / "model.safetensors"))
    assert caught.value.kind == "needs-base"
    assert "--base" in str(caught.value.hint)


def test_a_base_of_another_variant_is_refused(tiny_flux_copy: Path, tmp_path: Path):
    state = weights_of(tiny_flux_copy)
    state["x_embedder.weight"] = torch.zeros(state["x_embedder.weight"].shape[0], 96, dtype=torch.bfloat16)
    save_file(state, tmp_path / "fill.safetensors")
    with pytest.raises(InputError, match="in_channels is 96 here, but 16 in the base") as caught:
        open_source(tmp_path / "fill.safetensors", base=tiny_flux_copy)
    assert caught.value.kind == "wrong-base"


def test_a_base_of_another_model_is_refused(tiny_flux_copy: Path, tmp_path: Path):
    file = bfl_file(tiny_flux_copy, tmp_path / "model.safetensors")
    config = tiny_flux_copy / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(InputError, match=r"the base .* is a SD3Transformer2DModel"):
        open_source(file, base=tiny_flux_copy)


def test_a_pruned_model_takes_the_base_of_the_whole_one(tiny_flux_copy: Path, tmp_path: Path):
    file = bfl_file(tiny_flux_copy, tmp_path / "model.safetensors")
    config = tiny_flux_copy / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 19}))
    assert open_source(file, base=tiny_flux_copy).config["num_layers"] == 1


# ------------------------------------------------------------------------------------------------- refusals


def quantized_file(tiny_flux: Path, out: Path, added: Mapping[str, Tensor]) -> Path:
    state = original_state(FLUX1, weights_of(tiny_flux))
    del state["img_in.weight"]
    save_file({**state, **{name: tensor.clone() for name, tensor in added.items()}}, out)
    return out


BYTES = torch.zeros(4, dtype=torch.uint8)
FLOAT8 = torch.zeros(4, 4, dtype=torch.float8_e4m3fn)
WORDS = torch.zeros(4, dtype=torch.int32)
SCHEMES: tuple[tuple[str, dict[str, Tensor]], ...] = (
    ("SVDQuant (nunchaku)", {"a.qweight": BYTES, "a.wscales": BYTES, "a.smooth": BYTES}),
    ("SVDQuant (comfy-kitchen)", {"a.proj_down": BYTES, "a.smooth_factor": BYTES, "a.comfy_quant": BYTES}),
    ("GPTQ", {"a.qweight": WORDS, "a.qzeros": WORDS, "a.scales": BYTES, "a.g_idx": WORDS}),
    ("AWQ", {"a.qweight": WORDS, "a.qzeros": WORDS, "a.scales": BYTES}),
    ("bitsandbytes NF4", {"img_in.weight": BYTES, "img_in.weight.quant_state.bitsandbytes__nf4": BYTES}),
    ("bitsandbytes FP4", {"img_in.weight": BYTES, "img_in.weight.quant_state.bitsandbytes__fp4": BYTES}),
    ("bitsandbytes INT8", {"img_in.weight": BYTES, "img_in.SCB": BYTES}),
    ("quanto", {"img_in.weight._data": BYTES, "img_in.weight._scale": BYTES}),
    # its 4-bit weights, as diffusers 0.42.1 saves them
    ("quanto", {f"img_in.weight.{name}": BYTES for name in ("_data._data", "_scale", "_shift")}),
    ("torchao", {"img_in._weight_qdata": BYTES, "img_in._weight_scale": BYTES}),
    ("compressed-tensors", {"img_in.weight_packed": WORDS, "img_in.weight_scale": BYTES}),
    ("NVFP4", {"img_in.weight": BYTES, "img_in.weight_scale": BYTES, "img_in.weight_scale_2": BYTES}),
    ("NVIDIA ModelOpt", {"img_in.weight": BYTES, "img_in.weight_quantizer._amax": BYTES}),
    # Quark 0.13 leaves the weights beside its scales at 16 bits
    ("AMD Quark", {"img_in._weight_quantizer.0.scale": BYTES.float()}),
    ("SDNQ", {"a.weight": BYTES, "a.scale": BYTES, "a.svd_up": BYTES, "a.svd_down": BYTES}),
    ("AQLM", {"a.codes": BYTES, "a.codebooks": BYTES, "a.scales": BYTES}),
    ("HIGGS", {"a.weight": WORDS, "a.scales": BYTES, "a.tables": BYTES, "a.tables2": BYTES}),
    ("MLX", {"img_in.weight": WORDS, "img_in.scales": BYTES, "img_in.biases": BYTES}),
    # its mxfp4, mxfp8 and nvfp4, as mlx 0.32.4 saves them
    ("MLX", {"img_in.weight": WORDS.to(torch.uint32), "img_in.scales": BYTES}),
    # ModelOpt 0.47.0 has the powers of two as bytes
    ("MXFP8 or MXFP4", {"img_in.weight": FLOAT8, "img_in.weight_scale": BYTES}),
    ("MXFP8 or MXFP4", {"img_in.weight": FLOAT8, "img_in.weight_scale": BYTES.view(torch.float8_e8m0fnu)}),
    (
        "NNCF",
        {"img_in.weight": BYTES.to(torch.int8), "__nncf_hooks.post_hooks.img_in:weight__0.0._scale": FLOAT8},
    ),
    (
        "8-bit floats with scales as img_in.scale, which svdq does not read",
        {"img_in.weight": FLOAT8, "img_in.scale": FLOAT8.float()},
    ),
    (
        "img_in.weight is stored as I8, img_in.weight_scale goes with it",
        {"img_in.weight": BYTES.to(torch.int8), "img_in.weight_scale": BYTES.float()},
    ),
    (
        "ComfyUI mxfp8",
        {"img_in.comfy_quant": torch.frombuffer(bytearray(b'{"format": "mxfp8"}'), dtype=torch.uint8)},
    ),
    (
        "ComfyUI layers of an unnamed format",
        {"img_in.comfy_quant": torch.frombuffer(bytearray(b'{"convrot": true}'), dtype=torch.uint8)},
    ),
    ("img_in.weight is stored as I8", {"img_in.weight": BYTES.to(torch.int8)}),
)


@pytest.mark.parametrize(("scheme", "added"), SCHEMES, ids=[name for name, _ in SCHEMES])
def test_a_quantized_file_is_refused_by_name(
    tiny_flux: Path, tmp_path: Path, scheme: str, added: dict[str, Tensor]
):
    file = quantized_file(tiny_flux, tmp_path / "q.safetensors", added)
    with pytest.raises(InputError) as caught:
        open_source(file, base=tiny_flux)
    assert f"already quantized ({scheme})" in caught.value.message
    assert (caught.value.kind, caught.value.code) == ("already-quantized", 3)
    assert "16-bit" in str(caught.value.hint)


def test_codes_of_no_known_scheme_have_the_name_that_a_config_beside_them_says(
    tiny_flux: Path, tmp_path: Path
):
    """SDNQ's keys are `weight` and `scale`; what packs them is in its config alone."""
    added = {"img_in.weight": BYTES, "img_in.scale": FLOAT8.float()}
    file = quantized_file(tiny_flux, tmp_path / "q.safetensors", added)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "sdnq"}}')
    with pytest.raises(InputError, match=r"already quantized \(SDNQ: img_in\.weight is stored as U8"):
        open_source(file, base=tiny_flux)


def test_metadata_may_be_null(tiny_flux: Path, tmp_path: Path):
    """As MLX writes it where it has none; safetensors reads it."""
    file = diffusers_file(tiny_flux, tmp_path / "m.safetensors")
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = file.read_bytes()[8 : 8 + length], file.read_bytes()[8 + length :]
    said = json.dumps({**json.loads(header), "__metadata__": None}).encode()
    file.write_bytes(len(said).to_bytes(8, "little") + said + data)
    assert load_file(file).keys() == open_source(file, base=tiny_flux).tensors.keys()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("model.onnx",), "an ONNX model"),
        (("openvino_model.xml", "openvino_model.bin"), "an OpenVINO model"),
        (("unet.plan",), "a TensorRT engine"),
        (("Unet.mlpackage",), "a Core ML model"),
        (("diffusion_flax_model.msgpack",), "Flax weights"),
        (("weights.npz",), "an archive of NumPy arrays"),
    ],
)
def test_a_model_of_another_framework_is_called_that(
    tiny_flux: Path, tmp_path: Path, names: tuple[str, ...], what: str
):
    (tmp_path / "config.json").write_bytes((tiny_flux / "transformer/config.json").read_bytes())
    for name in names:
        # first bytes of a pickle that torch saves, and of a zip archive
        (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(60))
        with pytest.raises(InputError, match=f"{name}: {what}, which svdq does not read"):
            open_source(tmp_path / name)
    with pytest.raises(InputError, match=f"holds {what}") as caught:
        open_source(tmp_path)
    assert ("safetensors.numpy" if "npz" in names[0] else "convert the model it was made from") in str(
        caught.value.hint
    )


def test_svdq_s_own_output_is_refused_by_name(tiny_flux: Path, tmp_path: Path, from_folder: bytes):
    (tmp_path / "lite.safetensors").write_bytes(from_folder)
    with pytest.raises(InputError, match=r"already quantized \(SVDQuant \(nunchaku\)\)"):
        open_source(tmp_path / "lite.safetensors", base=tiny_flux)


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_whatever_it_is_called(tmp_path: Path, name: str, zipped: bool):
    torch.save({"weight": torch.zeros(300)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="this is a pickle") as caught:
        open_source(tmp_path / name)
    assert caught.value.kind == "pickle"
    assert "safetensors" in str(caught.value.hint)


def test_a_truncated_single_file_is_named(tiny_flux: Path, tmp_path: Path):
    file = bfl_file(tiny_flux, tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated") as caught:
        open_source(file, base=tiny_flux)
    assert caught.value.kind == "damaged-file"


def test_a_tensor_without_a_place_is_named(tiny_flux: Path, tmp_path: Path):
    state = original_state(FLUX1, weights_of(tiny_flux))
    save_file({**state, "double_blocks.0.img_attn.extra.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"have no place .*double_blocks\.0\.img_attn\.extra\.weight"):
        open_source(tmp_path / "m.safetensors", base=tiny_flux)


def test_a_file_of_no_known_model_shows_what_it_holds(tmp_path: Path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"it holds lora_unet_x\.lora_down\.weight") as caught:
        open_source(tmp_path / "m.safetensors")
    assert "--lora" in str(caught.value.hint)


def test_nan_weights_stop_the_conversion_and_name_the_stored_key(tiny_flux: Path, tmp_path: Path):
    state = original_state(FLUX1, weights_of(tiny_flux))
    state["double_blocks.0.img_attn.qkv.weight"][3, 5] = torch.nan
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="NaN") as caught:
        converted_bytes(tmp_path / "m.safetensors", tiny_flux, tmp_path / "out")
    assert "stored as double_blocks.0.img_attn.qkv.weight" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_one_row_range_is_read_without_the_rest(tiny_flux: Path, tmp_path: Path):
    source: Source = open_source(bfl_file(tiny_flux, tmp_path / "m.safetensors"), base=tiny_flux)
    for name in ("transformer_blocks.0.attn.to_k.weight", "norm_out.linear.bias"):
        entry = source.tensors[name]
        assert torch.equal(entry.read(), weights_of(tiny_flux)[name])
        assert torch.equal(entry.read_rows(2, 7), weights_of(tiny_flux)[name][2:7])


def test_rows_are_those_of_the_whole_tensor_over_the_borders_of_its_parts(tmp_path: Path):
    """As of a fused matrix whose halves are swapped."""
    stored = torch.arange(48.0).reshape(12, 4)
    save_file({"fused": stored}, tmp_path / "a.safetensors")
    (entry,) = read_header(tmp_path / "a.safetensors").values()
    swapped = RowsTensor((Rows(entry, 7, 12), Rows(entry, 2, 5)))
    whole = torch.cat([stored[7:12], stored[2:5]])
    assert torch.equal(swapped.read(), whole)
    for start in range(9):
        for stop in range(12):
            assert torch.equal(swapped.read_rows(start, stop), whole[start:stop]), (start, stop)


def test_content_is_hashed_in_blocks_to_the_digest_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensors, "HASHED_AT_ONCE", 100)
    save_file({"a": torch.randn(7, 13), "empty": torch.zeros(0, 3)}, tmp_path / "a.safetensors")
    for entry in read_header(tmp_path / "a.safetensors").values():
        content = entry.read().numpy().tobytes()
        assert content_sha256(entry) == hashlib.sha256(content).hexdigest()
