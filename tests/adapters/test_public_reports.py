"""LoRAs of public bug reports (tests/reports/README.md), which other programs fail on or leave out, merge here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.source import Source, open_source, read_tensor
from tests.tiny_families import tiny_flux2, tiny_z_image

RANK = 4


def saved(make: Callable[[], Any], folder: Path) -> Source:
    torch.manual_seed(0)
    transformer: Any = make().transformer
    transformer.to(torch.bfloat16)
    transformer.save_pretrained(folder)
    return open_source(folder)


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return saved(tiny_z_image, tmp_path_factory.mktemp("z"))


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return saved(tiny_flux2, tmp_path_factory.mktemp("flux2"))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def changes(source: Source, file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the LoRA adds to each weight that it changes."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    merged = merge_loras(source, [LoraFile(file, 1.0)])
    found = {
        name: read_tensor(merged, name).float() - read_tensor(source, name).float() for name in source.tensors
    }
    return {name: change for name, change in found.items() if change.count_nonzero()}


def require(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # the sum of weight and change is rounded in float32
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)


def kohya(name: str, rows: int, columns: int, *, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A layer of a file with alpha = rank / 2, and its change."""
    down, up = normal(RANK, columns, seed=seed), normal(rows, RANK, seed=seed + 1)
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
    }
    return tensors, up @ down / 2


@pytest.mark.parametrize("with_modulation", [True, False])
def test_a_kohya_lora_of_flux_s_last_layer_merges_with_or_without_its_modulation(
    tiny_flux: Path, tmp_path: Path, with_modulation: bool
):
    """BFL's modulation gives shift and scale, diffusers' the other way round."""
    source = open_source(tiny_flux)
    rows, columns = source.tensors["proj_out.weight"].shape
    tensors, change = kohya("lora_unet_final_layer_linear", rows, columns, seed=0)
    expected = {"proj_out.weight": change}
    if with_modulation:
        rows, columns = source.tensors["norm_out.linear.weight"].shape
        more, change = kohya("lora_unet_final_layer_adaLN_modulation_1", rows, columns, seed=2)
        tensors |= more
        expected["norm_out.linear.weight"] = torch.cat(change.chunk(2)[::-1])
    require(changes(source, tmp_path / "lora.safetensors", tensors), expected)


def test_a_kohya_lora_of_flux_s_input_layers_merges(tiny_flux: Path, tmp_path: Path):
    source = open_source(tiny_flux)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for seed, (theirs, name) in enumerate({"img_in": "x_embedder", "txt_in": "context_embedder"}.items()):
        more, expected[f"{name}.weight"] = kohya(
            f"lora_unet_{theirs}", *source.tensors[f"{name}.weight"].shape, seed=10 * seed
        )
        tensors |= more
    require(changes(source, tmp_path / "lora.safetensors", tensors), expected)


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."], ids=["musubi-tuner", "ai-toolkit"])
def test_loras_of_z_image_with_q_k_and_v_apart_merge(z_image: Source, tmp_path: Path, prefix: str):
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for seed, name in enumerate(
        f"layers.0.attention.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")
    ):
        theirs = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
        more, change = kohya(theirs, *z_image.tensors[f"{name}.weight"].shape, seed=10 * seed)
        if prefix.endswith("."):  # peft's names, without alphas
            more = {f"{theirs}.lora_A.weight": more[f"{theirs}.lora_down.weight"],
                    f"{theirs}.lora_B.weight": more[f"{theirs}.lora_up.weight"]}  # fmt: skip
            change = change * 2
        tensors |= more
        expected[f"{name}.weight"] = change
    require(changes(z_image, tmp_path / "lora.safetensors", tensors), expected)


def test_a_lokr_of_z_image_in_ai_toolkit_s_names_merges(z_image: Source, tmp_path: Path):
    name = "layers.0.attention.to_q"
    rows, columns = z_image.tensors[f"{name}.weight"].shape
    w1, w2 = normal(4, 4, seed=0), normal(rows // 4, columns // 4, seed=1)
    theirs = f"diffusion_model.{name}"
    tensors = {f"{theirs}.lokr_w1": w1, f"{theirs}.lokr_w2": w2, f"{theirs}.alpha": torch.tensor(1e9)}
    expected = {f"{name}.weight": torch.kron(w1, w2)}  # of whole matrices, alpha means nothing
    require(changes(z_image, tmp_path / "lokr.safetensors", tensors), expected)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_lokr_of_flux_2_s_fused_attention_is_taken_apart(flux2: Source, tmp_path: Path, prefix: str):
    names = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    rows, columns = flux2.tensors[names[0]].shape
    w1, w2 = normal(4, 4, seed=0), normal(3 * rows // 4, columns // 4, seed=1)
    theirs = f"{prefix}double_blocks.0.img_attn.qkv"
    tensors = {f"{theirs}.lokr_w1": w1, f"{theirs}.lokr_w2": w2, f"{theirs}.alpha": torch.tensor(1e9)}
    expected = dict(zip(names, torch.kron(w1, w2).chunk(3), strict=True))
    require(changes(flux2, tmp_path / "lokr.safetensors", tensors), expected)


def test_a_lora_of_z_image_s_modulation_with_an_alpha_merges(z_image: Source, tmp_path: Path):
    name = "layers.0.adaLN_modulation.0"
    tensors, change = kohya(f"diffusion_model.{name}", *z_image.tensors[f"{name}.weight"].shape, seed=0)
    require(changes(z_image, tmp_path / "lora.safetensors", tensors), {f"{name}.weight": change})


def test_a_lokr_of_flux_2_s_feed_forward_in_simpletuner_s_names_merges(flux2: Source, tmp_path: Path):
    rows, columns = flux2.tensors["transformer_blocks.0.ff.linear_in.weight"].shape
    w1, w2 = normal(4, 4, seed=0), normal(rows // 4, columns // 4, seed=1)
    theirs = "lycoris_transformer_blocks_0_ff_linear_in"
    tensors = {f"{theirs}.lokr_w1": w1, f"{theirs}.lokr_w2": w2, f"{theirs}.alpha": torch.tensor(1.0)}
    expected = {"transformer_blocks.0.ff.linear_in.weight": torch.kron(w1, w2)}
    require(changes(flux2, tmp_path / "lokr.safetensors", tensors), expected)


def test_a_lora_of_flux_2_in_ai_toolkit_s_names_merges(flux2: Source, tmp_path: Path):
    names = [f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv"]
    rows, columns = flux2.tensors[names[0]].shape
    down, up = normal(RANK, columns, seed=0), normal(3 * rows, RANK, seed=1)
    theirs = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": up}
    expected = dict(zip(names, (up @ down).chunk(3), strict=True))
    require(changes(flux2, tmp_path / "lora.safetensors", tensors), expected)


@pytest.mark.parametrize(
    "theirs",
    [
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_q",
        "lora_transformer_transformer_blocks_0_attn_to_q",
        "lora_unet_transformer_blocks_0_attn_to_q",
    ],
)
def test_every_form_that_onetrainer_saves_merges(tiny_flux: Path, tmp_path: Path, theirs: str):
    """diffusers' own names with kohya's endings, too, which diffusers did not read; trained embeddings are left out."""
    source = open_source(tiny_flux)
    name = "transformer_blocks.0.attn.to_q.weight"
    tensors, change = kohya(theirs, *source.tensors[name].shape, seed=0)
    tensors["bundle_emb.token.clip_l"] = normal(2, 8, seed=2)
    require(changes(source, tmp_path / "lora.safetensors", tensors), {name: change})
