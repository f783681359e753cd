"""An output is a pipeline that loads: what its source lacks is said before the work, and variants get plain names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from svdq_cli import load_pipeline
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.errors import InputError
from svdq_cli.recipe import Recipe, default_recipe, with_overrides
from svdq_cli.source.whole import require_component

T5 = "text_encoder_2/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
Damage = Callable[[Path], object]


def datafree(source: Path, **more: object) -> Recipe:
    settings = {"quantization.effort": "datafree", "quantization.rank": 16, **more}
    return with_overrides(default_recipe(str(source)), settings)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def point(file: Path) -> None:
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123456\n")


def pickle(file: Path) -> None:
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def lose_a_tensor(file: Path, lost: str) -> None:
    save_file(
        {name: t for name, t in load_file(file).items() if name != lost}, file, metadata={"format": "pt"}
    )


def lose_a_shard(file: Path) -> None:
    model = T5EncoderModel.from_pretrained(file.parent)
    file.unlink()
    model.save_pretrained(file.parent, max_shard_size="100KB")
    (file.parent / "model-00002-of-00002.safetensors").unlink()


DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no folder": (lambda f: shutil.rmtree(f / "vae"), "input", "component 'vae' is missing"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "input", "component 'tokenizer' is missing"),
    "no weights": (lambda f: (f / T5).unlink(), "not-found", "the weights of text_encoder_2 are missing"),
    "no config": (lambda f: (f / "text_encoder_2/config.json").unlink(), "input", "config.json is missing"),
    "no tensor": (
        lambda f: lose_a_tensor(f / VAE, "decoder.conv_in.weight"),
        "damaged-file",
        "the weights lack 1 tensor of AutoencoderKL: decoder.conv_in.weight",
    ),
    "no tensor of a text encoder": (
        lambda f: lose_a_tensor(f / T5, "encoder.block.0.layer.0.SelfAttention.k.weight"),
        "damaged-file",
        "text_encoder_2: the weights lack 1 tensor of T5EncoderModel: encoder.block.0.layer.0.SelfAttention.k",
    ),
    "no scheduler config": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        "input",
        "scheduler_config.json is missing",
    ),
    "empty tokenizer": (
        lambda f: [file.unlink() for file in (f / "tokenizer").iterdir()],
        "input",
        "the files of tokenizer are missing",
    ),
    "truncated": (lambda f: truncate(f / T5), "damaged-file", "it is truncated"),
    "Git LFS pointer": (lambda f: point(f / T5), "input", "a Git LFS pointer"),
    "pickle": (lambda f: pickle(f / T5), "pickle", "pytorch_model.bin: this is a pickle"),
    "missing shard": (lambda f: lose_a_shard(f / T5), "not-found", "model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_pipeline_that_would_not_load_again_is_refused_before_the_work(
    damage: str, tiny_flux_copy: Path, tmp_path: Path
):
    do, kind, says = DAMAGES[damage]
    do(tiny_flux_copy)
    recipe = datafree(tiny_flux_copy)
    with pytest.raises(InputError, match=says) as caught:
        convert(recipe, tmp_path / "out")
    assert caught.value.kind == kind
    assert caught.value.hint
    with pytest.raises(InputError, match=says):
        predict(recipe)


def test_calibration_refuses_it_by_the_same_name(tiny_flux_copy: Path, tmp_path: Path):
    truncate(tiny_flux_copy / T5)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    recipe = datafree(tiny_flux_copy, **{"calibration.prompts": str(tmp_path / "prompts.txt")})
    with pytest.raises(InputError, match=f"{T5}: damaged"):
        calibrate(recipe, tmp_path / "calib")


def test_older_names_of_an_autoencoder_s_attention_are_whole(tmp_path: Path):
    model = AutoencoderKL(block_out_channels=(32,), norm_num_groups=4)
    model.save_pretrained(tmp_path / "vae")
    file = tmp_path / VAE
    older = load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        older = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in older.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in older
    save_file(older, file)
    require_component(tmp_path, "vae", "AutoencoderKL")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    save_file({name: t for name, t in older.items() if not name.endswith("0.query.bias")}, file)
    with pytest.raises(InputError, match=r"lack 2 tensors of AutoencoderKL: decoder.*attentions.0.to_q.bias"):
        require_component(tmp_path, "vae", "AutoencoderKL")


def test_a_single_file_needs_no_other_component(tiny_flux_copy: Path, tmp_path: Path):
    shutil.rmtree(tiny_flux_copy / "vae")
    outputs = [{"format": "comfy", "path": str(tmp_path / "out.safetensors")}]
    convert(datafree(tiny_flux_copy, outputs=outputs), tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").is_file()


def shard_as_variant(folder: Path) -> None:
    """As diffusers and transformers save `variant="fp16"` with a limit on a file's size."""
    T5EncoderModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB", variant="fp16")
    (folder / "model.safetensors").unlink()


def test_a_pipeline_of_variants_becomes_one_that_loads(tiny_flux_copy: Path, tmp_path: Path):
    expected = load_file(tiny_flux_copy / "vae/diffusion_pytorch_model.safetensors")
    shard_as_variant(tiny_flux_copy / "text_encoder_2")
    for file in tiny_flux_copy.glob("[tv]*/*model.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    out = tmp_path / "out"
    convert(datafree(tiny_flux_copy), out)
    assert not list(out.rglob("*fp16*"))
    index = json.loads((out / "text_encoder_2/model.safetensors.index.json").read_text())
    assert {(out / "text_encoder_2" / name).is_file() for name in index["weight_map"].values()} == {True}
    pipe = load_pipeline(out, device="cpu", dtype=torch.bfloat16)
    assert {k: v.tolist() for k, v in pipe.vae.state_dict().items()} == {
        k: v.tolist() for k, v in expected.items()
    }


def test_calibration_generates_from_variants(tiny_flux_copy: Path, tmp_path: Path):
    for file in tiny_flux_copy.glob("[tv]*/*model.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    small = {"prompts": str(tmp_path / "prompts.txt"), "samples": 1, "steps": 1, "height": 32, "width": 32}
    recipe = datafree(tiny_flux_copy, **{f"calibration.{key}": value for key, value in small.items()})
    assert calibrate(recipe, tmp_path / "calib").path == str(tmp_path / "calib")


def test_a_variant_beside_the_weights_is_not_copied(tiny_flux_copy: Path, tmp_path: Path):
    weights = tiny_flux_copy / "vae/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    convert(datafree(tiny_flux_copy), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out/vae").glob("*.safetensors")] == [weights.name]
