"""A GGUF file is the model it was made from, within the error of its own quantization."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import EnvironmentLacksError, InputError
from svdq_cli.recipe import default_recipe, with_overrides
from svdq_cli.source import open_source, read_tensor, source_digest
from svdq_cli.source.original_names import FLUX1, NAMINGS
from tests.source.originals import original_state
from tests.source.test_single_file import weights_of
from tests.tiny_families import tiny_pipeline

Kind = GGMLQuantizationType


def gguf_file(state: dict[str, Tensor], out: Path, kind: Kind, *, vectors: bool = False) -> Path:
    """Matrices as `kind`, vectors and what does not divide into its blocks as float32, as most converters do.

    `vectors`: they are quantized too, as stable-diffusion.cpp does with the weights of norms."""
    writer = GGUFWriter(str(out), "flux")
    for name, tensor in state.items():
        values = tensor.float().numpy()
        chosen = kind if tensor.ndim > (not vectors) and tensor.shape[-1] % 32 == 0 else Kind.F32
        if chosen in (Kind.F32, Kind.F16):
            writer.add_tensor(name, values.astype(numpy.float16 if chosen == Kind.F16 else numpy.float32))
        else:
            writer.add_tensor(name, quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def bfl_state(tiny_flux: Path) -> dict[str, Tensor]:
    return original_state(FLUX1, weights_of(tiny_flux))


# Largest rounding error in quantization steps of the group's largest value: half a step of 127, 15 or 31.
@pytest.mark.parametrize(
    ("kind", "group", "steps"), [(Kind.Q8_0, 32, 127), (Kind.Q4_0, 32, 8), (Kind.Q5_0, 32, 16)]
)
def test_a_quantized_file_is_the_model_within_its_own_error(
    tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor], kind: Kind, group: int, steps: int
):
    source = open_source(gguf_file(bfl_state, tmp_path / "m.gguf", kind), base=tiny_flux)
    assert kind.name in source.warnings[0]
    original = weights_of(tiny_flux)
    for name in ("transformer_blocks.0.attn.to_k.weight", "single_transformer_blocks.0.proj_mlp.weight"):
        found, expected = read_tensor(source, name), original[name].float()
        largest = expected.reshape(-1, group).abs().amax(dim=1)
        error = (found - expected).reshape(-1, group).abs().amax(dim=1)
        # half a step, one for the 4- and 5-bit kinds whose positive end is one step short; scales are float16
        allowed = largest / steps * (0.5 if kind == Kind.Q8_0 else 1.0) + largest * 2**-10
        assert bool((error <= allowed).all())
        assert float(error.max()) > 0
    assert torch.equal(read_tensor(source, "proj_out.bias"), original["proj_out.bias"].float())


def test_quantized_vectors_are_read_too(tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]):
    """stable-diffusion.cpp stores the weights of SD 1.5's and SDXL's group norms in 4 bits."""
    source = open_source(gguf_file(bfl_state, tmp_path / "m.gguf", Kind.Q4_0, vectors=True), base=tiny_flux)
    expected = weights_of(tiny_flux)["transformer_blocks.0.ff.net.0.proj.bias"].float()
    found = read_tensor(source, "transformer_blocks.0.ff.net.0.proj.bias")
    assert found.shape == expected.shape
    blocks = expected.reshape(-1, 32)
    # Q4_0 has 8 steps for the largest value of a block, of which the one opposite to it is clipped
    assert bool(((found.reshape(-1, 32) - blocks).abs() <= blocks.abs().amax(1, keepdim=True) / 8).all())


def test_unquantized_gguf_is_the_same_model(tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]):
    source = open_source(gguf_file(bfl_state, tmp_path / "m.gguf", Kind.BF16), base=tiny_flux)
    assert source.warnings == ()
    original = weights_of(tiny_flux)
    assert all(torch.equal(read_tensor(source, n).float(), t.float()) for n, t in original.items())
    entry = source.tensors["norm_out.linear.weight"]
    assert torch.equal(entry.read_rows(3, 9), original["norm_out.linear.weight"][3:9])


def test_float16_is_read_as_it_is(tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]):
    source = open_source(gguf_file(bfl_state, tmp_path / "m.gguf", Kind.F16), base=tiny_flux)
    assert read_tensor(source, "proj_out.weight").dtype == torch.float16


def test_k_quants_are_read_in_torch_s_order_of_sizes(
    tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]
):
    name = "double_blocks.0.img_mlp.2.weight"
    n, k = bfl_state[name].shape
    blocks = numpy.random.default_rng(0).integers(0, 256, (n, k // 256, 144), dtype=numpy.uint8)
    blocks[..., :4] = numpy.full((n, k // 256, 2), 0.01, dtype=numpy.float16).view(numpy.uint8)  # d, dmin
    packed = blocks.reshape(n, -1)
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "flux")
    for key, tensor in bfl_state.items():
        if key == name:
            writer.add_tensor(key, packed, raw_dtype=Kind.Q4_K)
        else:
            writer.add_tensor(key, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = open_source(tmp_path / "m.gguf", base=tiny_flux).tensors["transformer_blocks.0.ff.net.2.weight"]
    expected = torch.from_numpy(dequantize(packed, Kind.Q4_K))
    assert entry.shape == (n, k)
    assert torch.equal(entry.read(), expected)
    assert torch.equal(entry.read_rows(5, 8), expected[5:8])


def test_a_gguf_file_converts_and_checks(tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]):
    file = gguf_file(bfl_state, tmp_path / "m.gguf", Kind.Q8_0)
    recipe = with_overrides(
        default_recipe(str(file)),
        {"quantization.effort": "datafree", "quantization.rank": 16, "model.base": str(tiny_flux)},
    )
    report = convert(recipe, tmp_path / "out")
    assert any("Q8_0" in warning for warning in report.warnings)
    # against the 16-bit model, not only against the file that it was made from
    assert check(tmp_path / "out", against=open_source(tiny_flux)).status == "ok"
    assert report.model.source_sha256 == source_digest(open_source(file, base=tiny_flux))


def test_a_truncated_gguf_file_is_named(tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]):
    file = gguf_file(bfl_state, tmp_path / "m.gguf", Kind.Q8_0)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"m\.gguf: damaged") as caught:
        open_source(file, base=tiny_flux)
    assert caught.value.kind == "damaged-file"


def test_without_the_package_the_cure_is_named(
    tmp_path: Path, bfl_state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    file = gguf_file(bfl_state, tmp_path / "other.gguf", Kind.Q8_0)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(EnvironmentLacksError) as caught:
        open_source(file)
    assert "pip install gguf" in str(caught.value.hint)


# ------------------------------------------------------------------------------------------------- whole pipelines


def whole_pipeline(bfl_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As stable-diffusion.cpp's convert writes it."""
    return {
        **{f"model.diffusion_model.{name}": tensor for name, tensor in bfl_state.items()},
        "vae.decoder.conv_in.weight": torch.zeros(32, 32),
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(64, 128),
    }


def test_what_lies_beside_the_model_is_left_out_with_a_warning(
    tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]
):
    found, alone = (
        open_source(gguf_file(state, tmp_path / name, Kind.Q8_0), base=tiny_flux)
        for name, state in (("whole.gguf", whole_pipeline(bfl_state)), ("alone.gguf", bfl_state))
    )
    assert source_digest(found) == source_digest(alone)
    assert f"the output has the vae of {tiny_flux}, not the file's, which lacks" in found.warnings[1]
    assert f"the output has the text_encoder of {tiny_flux}, not the file's, which lacks" in found.warnings[2]


@pytest.mark.parametrize(("kind", "taken"), [(Kind.BF16, True), (Kind.Q8_0, False)])
def test_a_text_encoder_is_taken_as_it_is_but_not_where_it_is_quantized(
    tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor], kind: Kind, taken: bool
):
    t5 = {
        name: 2 * tensor for name, tensor in load_file(tiny_flux / "text_encoder_2/model.safetensors").items()
    }
    prefix = "text_encoders.t5xxl.transformer."
    state = {**bfl_state, **{prefix + name: tensor for name, tensor in t5.items()}}
    opened = open_source(gguf_file(state, tmp_path / "m.gguf", kind), base=tiny_flux)
    if taken:
        found = {name: entry.read().float() for name, entry in opened.companions["text_encoder_2"].items()}
        assert all(torch.equal(found[name], tensor.float()) for name, tensor in t5.items())
        assert opened.warnings == ()
    else:
        assert opened.companions == {}
        assert "not the file's, which is quantized" in opened.warnings[1]


def test_counters_and_float64_are_read_past_and_rounded(
    tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]
):
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "flux")
    for name, tensor in bfl_state.items():
        writer.add_tensor(name, tensor.double().numpy())
    writer.add_tensor("position_ids", numpy.arange(77, dtype=numpy.int64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "m.gguf", base=tiny_flux)
    assert torch.equal(
        read_tensor(source, "proj_out.weight"), weights_of(tiny_flux)["proj_out.weight"].float()
    )
    assert "position_ids" in source.warnings[0]


def as_ggml_has_it(tensor: Tensor) -> Tensor:
    """Without first axes of 1, and of five axes the first two as one: what stable-diffusion.cpp writes."""
    if tensor.ndim == 5:
        return tensor.flatten(0, 1)
    while tensor.ndim > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("z-image", "x_pad_token"),
        ("sd3", "pos_embed.pos_embed"),
        ("wan", "blocks.0.scale_shift_table"),
        ("wan", "patch_embedding.weight"),
    ],
)
def test_axes_that_stable_diffusion_cpp_drops_or_folds_are_there_again(
    tmp_path: Path, family: str, name: str
):
    """ComfyUI-GGUF #379 and #136, SGLang #38904: other readers take the file for another model."""
    base = tiny_pipeline(family, tmp_path / "base")
    state = weights_of(base)
    naming = next((n for n in NAMINGS if n.model_class == open_source(base).config["_class_name"]), None)
    assert naming is not None
    stored = {key: as_ggml_has_it(value) for key, value in original_state(naming, state).items()}
    source = open_source(gguf_file(stored, tmp_path / "m.gguf", Kind.F16), base=base)
    assert source.tensors[name].shape == tuple(state[name].shape)
    assert torch.equal(read_tensor(source, name), state[name].half().to(read_tensor(source, name).dtype))
    assert source.tensors.keys() == state.keys()


def test_a_tensor_that_a_converter_reshaped_has_the_shape_that_the_file_says(
    tiny_flux: Path, tmp_path: Path, bfl_state: dict[str, Tensor]
):
    """InvokeAI #9537: ComfyUI's converter makes rows of 256 of what does not divide into blocks."""
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "flux")
    for name, tensor in bfl_state.items():
        stored = tensor.reshape(-1, 256) if name == "img_in.weight" else tensor
        writer.add_tensor(name, stored.float().numpy())
    writer.add_array("comfy.gguf.orig_shape.img_in.weight", list(bfl_state["img_in.weight"].shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(tmp_path / "m.gguf", base=tiny_flux)
    assert torch.equal(read_tensor(source, "x_embedder.weight"), bfl_state["img_in.weight"].float())


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("token_embd.weight", "a text encoder or another part of a language model"),
        ("enc.blk.0.attn_q.weight", "a text encoder or another part of a language model"),
        ("double_blocks.0.img_attn.proj.weight.lora_a", "a LoRA"),
    ],
)
def test_a_gguf_file_of_another_kind_is_called_that(tmp_path: Path, key: str, what: str):
    file = gguf_file({key: torch.zeros(4, 32)}, tmp_path / "m.gguf", Kind.F16)
    with pytest.raises(InputError, match=f"m.gguf: {what}.*, not a diffusion model"):
        open_source(file)


def test_a_shard_of_a_gguf_file_says_how_to_join_them(tmp_path: Path):
    file = tmp_path / "wan-00002-of-00003.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="shard 2 of 3") as caught:
        open_source(file)
    assert caught.value.kind == "one-shard"
    assert "llama-gguf-split --merge" in str(caught.value.hint)


def test_a_folder_of_gguf_files_says_which_file_to_give(tmp_path: Path):
    (tmp_path / "flux1-Q4_K_S.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="a folder with 1 GGUF file and no pipeline") as caught:
        open_source(tmp_path)
    assert caught.value.hint == f"give the file: {tmp_path / 'flux1-Q4_K_S.gguf'}"
