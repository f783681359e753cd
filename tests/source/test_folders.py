"""Sources are indexed from headers, and whatever is wrong with one is said before any weight is read."""

from __future__ import annotations

import json
import shutil
import struct
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.cli import run
from svdq_cli.errors import InputError
from svdq_cli.source import open_source, read_header, read_tensor, source_digest

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_a_pipeline_folder_is_indexed_without_reading_weights(tiny_flux: Path):
    source = open_source(tiny_flux)
    assert source.component == "transformer"
    assert source.pipeline == tiny_flux
    entry = source.tensors["proj_out.weight"]
    assert entry.dtype == "BF16"
    assert torch.equal(
        read_tensor(source, "proj_out.weight"), load_file(tiny_flux / WEIGHTS)["proj_out.weight"]
    )


def test_shards_are_read_through_their_index(tiny_flux_copy: Path):
    weights = tiny_flux_copy / WEIGHTS
    tensors = load_file(weights)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, weights.parent / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (weights.parent / f"{weights.name}.index.json").write_text(json.dumps(index))
    weights.unlink()
    source = open_source(tiny_flux_copy)
    assert sorted(source.tensors) == names
    assert len(source.files) == 2
    (weights.parent / "b.safetensors").unlink()
    with pytest.raises(InputError, match=r"b\.safetensors: this shard is missing"):
        open_source(tiny_flux_copy)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model._orig_mod."])
def test_what_a_trainer_s_wrappers_put_before_names_is_taken_off(
    tiny_flux: Path, tiny_flux_copy: Path, prefix: str
):
    weights = tiny_flux_copy / WEIGHTS
    wrapped = {prefix + name: tensor for name, tensor in load_file(weights).items()}
    names = sorted(wrapped)
    weights.unlink()
    for number in (1, 2):
        shard = weights.with_name(f"{weights.stem}-0000{number}-of-00002.safetensors")
        save_file({name: wrapped[name] for name in names[number - 1 :: 2]}, shard)
    assert source_digest(open_source(tiny_flux_copy)) == source_digest(open_source(tiny_flux))
    alone = open_source(weights.parent)
    assert alone.tensors.keys() == open_source(tiny_flux).tensors.keys()


def test_a_truncated_file_is_named(tiny_flux_copy: Path):
    weights = tiny_flux_copy / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated") as caught:
        open_source(tiny_flux_copy)
    assert caught.value.kind == "damaged-file"
    assert caught.value.where == str(weights)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"w": {"shape": [2], "dtype": "F32"}}',
        b'{"w": {"shape": [2], "dtype": "F32", "data_offsets": [0, 4000]}}',
        b'{"w": {"shape": [9], "dtype": "F32", "data_offsets": [0, 8]}}',
        b'{"w": {"shape": [-2], "dtype": "F32", "data_offsets": [8, 0]}}',
    ],
    ids=["not-json", "a-list", "no-offsets", "out-of-range", "size-disagrees", "negative"],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes):
    file = tmp_path / "liar.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(InputError, match="damaged"):
        read_header(file)


@pytest.mark.parametrize("size", [2**63, 2**64])
def test_a_dimension_that_nothing_counts_with_is_refused_even_of_no_numbers(tmp_path: Path, size: int):
    file = tmp_path / "vast.safetensors"
    header = json.dumps({"w": {"shape": [0, size], "dtype": "F32", "data_offsets": [0, 0]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(InputError, match="malformed"):
        read_header(file)


def test_a_header_length_beyond_the_file_is_refused(tmp_path: Path):
    file = tmp_path / "pickle.safetensors"
    file.write_bytes(b"\x80\x04\x95" + bytes(100))
    with pytest.raises(InputError, match="not safetensors"):
        read_header(file)


def test_pickled_weights_are_refused_in_words(tiny_flux_copy: Path):
    weights = tiny_flux_copy / WEIGHTS
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="pickle"):
        open_source(tiny_flux_copy)


def test_weights_that_are_there_only_as_a_variant_are_read(tiny_flux_copy: Path):
    digest = source_digest(open_source(tiny_flux_copy))
    as_variant(tiny_flux_copy / WEIGHTS, "fp16")
    source = open_source(tiny_flux_copy)
    assert source_digest(source) == digest
    assert "read from variant fp16" in source.warnings[0]


@pytest.mark.parametrize("names", [("ema", "non_ema")])
def test_of_several_variants_it_is_asked_which_one_is_meant(tiny_flux_copy: Path, names: tuple[str, ...]):
    weights = tiny_flux_copy / WEIGHTS
    for name in names:
        shutil.copy(weights, weights.with_name(f"diffusion_pytorch_model.{name}.safetensors"))
    weights.unlink()
    with pytest.raises(InputError, match="only as several variants \\(ema, non_ema\\)") as caught:
        open_source(tiny_flux_copy)
    assert caught.value.kind == "variant-only"
    assert "diffusion_pytorch_model.safetensors" in str(caught.value.hint)


def as_variant(file: Path, variant: str) -> None:
    file.rename(file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))


def test_a_quantized_model_is_refused_by_name(tiny_flux_copy: Path):
    config = tiny_flux_copy / "transformer/config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(InputError, match="already quantized \\(bitsandbytes\\)") as caught:
        open_source(tiny_flux_copy)
    assert caught.value.kind == "already-quantized"


@pytest.mark.parametrize("command", ["inspect", "check", "export --to nunchaku -o out.safetensors"])
def test_every_command_calls_a_quantized_model_by_its_quantizer(
    tiny_flux_copy: Path, capsys: pytest.CaptureFixture[str], command: str
):
    config = tiny_flux_copy / "transformer/config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "quantization_config": {"quant_method": "modelopt"}}))
    name, *options = command.split()
    assert run([name, str(tiny_flux_copy), *options, "--json", "-q"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "already-quantized"
    assert "already quantized (NVIDIA ModelOpt)" in error["message"]
    assert "convert the 16-bit model" in error["hint"]


def test_a_folder_in_float8_names_the_way_that_its_file_is_read(tiny_flux_copy: Path):
    config = tiny_flux_copy / "transformer/config.json"
    said = {"quant_method": "modelopt", "quant_algo": "FP8"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": said}))
    with pytest.raises(InputError, match=r"NVIDIA ModelOpt") as caught:
        open_source(tiny_flux_copy)
    assert "give the weight file with --base" in str(caught.value.hint)


def test_integer_weights_are_refused_by_dtype(tiny_flux_copy: Path):
    weights = tiny_flux_copy / WEIGHTS
    tensors = load_file(weights)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, weights)
    with pytest.raises(InputError, match=r"proj_out\.weight is stored as I8") as caught:
        open_source(tiny_flux_copy)
    assert caught.value.kind == "already-quantized"


def test_the_digest_follows_the_weights(tiny_flux: Path, tiny_flux_copy: Path):
    before = source_digest(open_source(tiny_flux_copy))
    assert before == source_digest(open_source(tiny_flux))
    weights = tiny_flux_copy / WEIGHTS
    tensors = load_file(weights)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1
    save_file(tensors, weights)
    assert source_digest(open_source(tiny_flux_copy)) != before


def test_a_digest_that_is_not_wanted_any_more_ends(tiny_flux: Path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(CancelledError):
        source_digest(open_source(tiny_flux), stop)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("vae", r"an autoencoder \(AutoencoderKL\), not a diffusion model"),
        ("vae/config.json", r"an autoencoder \(AutoencoderKL\)"),
        ("text_encoder", r"a text encoder or another model of transformers \(CLIPTextModel\)"),
        ("scheduler", "a scheduler, not a diffusion model"),
        ("tokenizer", "a tokenizer, not a diffusion model"),
        ("model_index.json", r"the index of a pipeline \(FluxPipeline\)"),
    ],
)
def test_another_part_of_a_pipeline_is_named_with_the_pipeline_to_give(tiny_flux: Path, part: str, what: str):
    with pytest.raises(InputError, match=what) as caught:
        open_source(tiny_flux / part)
    assert caught.value.hint == f"give the pipeline it belongs to: {tiny_flux}"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "an image, not safetensors"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a Git LFS pointer instead of the file",
        ),
        (b"<!DOCTYPE html><html>Please log in</html>", "a web page instead of the file"),
        (b"import torch\n\nprint('a script')\n", "a text file"),
        (b"hello", "a text file"),
        (b"\x07" * 40, "damaged"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path: Path, content: bytes, what: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=what) as caught:
        open_source(path)
    assert caught.value.hint


# ------------------------------------------------------------------------------------------------- trainers' folders


def checkpoint_of(pipeline: Path, folder: Path, *names: str) -> Path:
    """What a trainer saves in order to resume: what it trained, and its own state."""
    for name in names:
        shutil.copytree(pipeline / "transformer", folder / name)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"\x80\x04state")
    return folder


@pytest.mark.parametrize("with_base", [True, False])
def test_a_trainer_s_checkpoint_is_read_with_and_without_a_base(
    with_base: bool, tiny_flux: Path, tmp_path: Path
):
    folder = checkpoint_of(tiny_flux, tmp_path / "checkpoint-500", "transformer")
    source = open_source(folder, base=tiny_flux if with_base else None)
    assert source_digest(source) == source_digest(open_source(tiny_flux))
    assert source.pipeline == (tiny_flux if with_base else None)
    assert source.component == "transformer"
    assert source.warnings == ()


def test_averaged_weights_beside_the_trained_ones_are_named(tiny_flux: Path, tmp_path: Path):
    folder = checkpoint_of(tiny_flux, tmp_path / "checkpoint-500", "transformer", "transformer_ema")
    (warning,) = open_source(folder, base=tiny_flux).warnings
    assert f"for the averaged weights give {folder / 'transformer_ema'}" in warning
    assert open_source(folder / "transformer_ema", base=tiny_flux).component == "transformer"


def test_of_two_denoisers_without_a_pipeline_it_is_asked_which(tiny_flux: Path, tmp_path: Path):
    folder = checkpoint_of(tiny_flux, tmp_path / "both", "transformer", "unet")
    with pytest.raises(InputError, match="holds transformer and unet, but no pipeline") as caught:
        open_source(folder)
    assert f"give one of them, {folder / 'transformer'}" in str(caught.value.hint)


@pytest.mark.parametrize("state", ["optimizer.bin", "training_args.bin", "scheduler.pt", "rng_state.pth"])
def test_a_trainer_s_state_beside_the_weights_is_no_pickle_of_a_model(
    state: str, tiny_flux: Path, tmp_path: Path
):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(tiny_flux / WEIGHTS, folder / "model_trained.safetensors")
    (folder / state).write_bytes(b"\x80\x04state")
    assert source_digest(open_source(folder, base=tiny_flux)) == source_digest(open_source(tiny_flux))


def test_a_folder_of_the_hub_s_cache_is_answered_with_its_snapshot(tiny_flux: Path, tmp_path: Path):
    folder = tmp_path / "models--owner--name"
    snapshot = folder / "snapshots" / "abc123"
    shutil.copytree(tiny_flux, snapshot)
    (folder / "snapshots" / "later").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc123\n")
    for what, base in ((folder, None), (tiny_flux / "transformer", folder)):
        with pytest.raises(InputError) as caught:
            open_source(what, base=base)
        assert f"give its snapshot, {snapshot}, or its Hub id: owner/name" in str(caught.value.hint)
