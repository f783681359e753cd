"""A LoRA under any trainer's names changes the weights that it was trained for, by up @ down times alpha / rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.adapters.changes import StoredChange
from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError, UsageError
from svdq_cli.prepare.from_command_line import override, parse_lora
from svdq_cli.prepare.options import DEFAULT_OPTIONS
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import Lora, default_recipe, with_overrides
from svdq_cli.source import Source, open_source, read_tensor, source_digest
from tests.source.test_configs import meta_shapes
from tests.source.test_single_file import WEIGHTS, bfl_file, weights_of

RANK = 4
Halves = tuple[Tensor, Tensor]  # down (R, K), up (N, R)

# Layers of the tiny FLUX.1 (width 128): diffusers layer -> outputs, inputs
LAYERS = {
    "transformer_blocks.0.attn.to_q": (128, 128),
    "transformer_blocks.0.attn.to_k": (128, 128),
    "transformer_blocks.0.attn.to_v": (128, 128),
    "transformer_blocks.0.attn.to_out.0": (128, 128),
    "transformer_blocks.0.ff.net.2": (128, 512),
}
BFL = {
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.0.ff.net.2": "double_blocks.0.img_mlp.2",
}
QKV = tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv")


def drawn(rows: int, columns: int, seed: int) -> Halves:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, columns, generator=generator), torch.randn(rows, RANK, generator=generator)


def trained() -> dict[str, Halves]:
    """One adapter; q, k, v share their down matrix, so that it can be said of the fused matrix too."""
    halves = {name: drawn(*shape, seed) for seed, (name, shape) in enumerate(LAYERS.items())}
    return {name: (halves[QKV[0]][0] if name in QKV else down, up) for name, (down, up) in halves.items()}


def peft(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    return {
        f"transformer.{name}.lora_{half}.weight": tensor.clone()
        for name, halves in adapter.items()
        for half, tensor in zip("AB", halves, strict=True)
    }


def fused(adapter: Mapping[str, Halves]) -> dict[str, Halves]:
    """Under BFL's names, q, k, v in one matrix."""
    qkv = adapter[QKV[0]][0], torch.cat([adapter[name][1] for name in QKV])
    return {"double_blocks.0.img_attn.qkv": qkv, **{BFL[name]: adapter[name] for name in BFL}}


def comfy(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    return {
        f"diffusion_model.{name}.lora_{half}.weight": tensor.clone()
        for name, halves in fused(adapter).items()
        for half, tensor in zip("AB", halves, strict=True)
    }


def kohya_names(layers: Mapping[str, Halves], prefix: str) -> dict[str, Tensor]:
    file: dict[str, Tensor] = {}
    for name, (down, up) in layers.items():
        flat = prefix + name.replace(".", "_")
        # trained with alpha 1: the matrices are larger by rank / alpha
        file[f"{flat}.lora_down.weight"] = down * RANK
        file[f"{flat}.lora_up.weight"] = up.clone()
        file[f"{flat}.alpha"] = torch.tensor(1.0)
    return file


def kohya_bfl(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    return kohya_names(fused(adapter), "lora_unet_")


def kohya_diffusers(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    return kohya_names(adapter, "lora_transformer_")


def xlabs(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    """XLabs knows attention only; the rest goes under BFL's names."""
    layers = fused(adapter)
    names = {
        "double_blocks.0.processor.qkv_lora1": layers["double_blocks.0.img_attn.qkv"],
        "double_blocks.0.processor.proj_lora1": layers["double_blocks.0.img_attn.proj"],
        "double_blocks.0.img_mlp.2.lora": layers["double_blocks.0.img_mlp.2"],
    }
    return {
        f"{name}.{half}.weight": tensor.clone()
        for name, halves in names.items()
        for half, tensor in zip(("down", "up"), halves, strict=True)
    }


def peft_without_prefix(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    return {
        name.replace("transformer.", "base_model.model.", 1).replace(".weight", ".default.weight"): tensor
        for name, tensor in peft(adapter).items()
    }


NAMES = (peft, peft_without_prefix, comfy, kohya_bfl, kohya_diffusers, xlabs)


@pytest.mark.parametrize("names", NAMES)
def test_every_naming_merges_to_the_same_weights(
    tiny_flux: Path, tmp_path: Path, names: Callable[[Mapping[str, Halves]], dict[str, Tensor]]
):
    adapter = trained()
    save_file(names(adapter), tmp_path / "lora.safetensors")
    merged = merge_loras(open_source(tiny_flux), [LoraFile(tmp_path / "lora.safetensors", 0.5)])
    original = weights_of(tiny_flux)
    for name, tensor in original.items():
        found = read_tensor(merged, name)
        layer = name.removesuffix(".weight")
        if layer not in adapter or not name.endswith(".weight"):
            assert torch.equal(found, tensor)
            continue
        down, up = adapter[layer]
        # float32 sums in another order
        torch.testing.assert_close(found, tensor.float() + 0.5 * up @ down, rtol=1e-5, atol=1e-5)


def test_merging_before_or_after_writing_the_model_is_the_same_conversion(tiny_flux: Path, tmp_path: Path):
    save_file(peft(trained()), tmp_path / "lora.safetensors")
    merged = merge_loras(open_source(tiny_flux), [LoraFile(tmp_path / "lora.safetensors", 0.25)])
    state = {name: read_tensor(merged, name).contiguous() for name in merged.tensors}
    save_file(state, tmp_path / "merged.safetensors")
    common = {"quantization.effort": "datafree", "quantization.rank": 16}
    lora = Lora(path=str(tmp_path / "lora.safetensors"), weight=0.25)
    first = with_overrides(default_recipe(str(tiny_flux)), {"model.loras": [lora], **common})  # type: ignore[arg-type]
    second = with_overrides(
        default_recipe(str(tmp_path / "merged.safetensors")),
        {"model.base": str(tiny_flux), **common},  # type: ignore[arg-type]
    )
    convert(first, tmp_path / "a")
    convert(second, tmp_path / "b")
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)
    assert source_digest(source_of(first, DEFAULT_OPTIONS)) == source_digest(
        source_of(second, DEFAULT_OPTIONS)
    )
    # the LoRA is in the file: checked against the model without it, the adapted layers are off
    wrong = {problem.layer for problem in check(tmp_path / "a", against=open_source(tiny_flux)).problems}
    assert wrong >= set(LAYERS)


def test_a_lora_goes_with_a_single_file_too(tiny_flux: Path, tmp_path: Path):
    save_file(comfy(trained()), tmp_path / "lora.safetensors")
    loras = [LoraFile(tmp_path / "lora.safetensors", 1.0)]
    file = bfl_file(tiny_flux, tmp_path / "model.safetensors")
    from_file = merge_loras(open_source(file, base=tiny_flux), loras)
    assert source_digest(from_file) == source_digest(merge_loras(open_source(tiny_flux), loras))
    assert from_file.kind == "single file, original (BFL) names, 1 LoRA merged"


def test_an_adapter_is_read_once_for_all_rows_of_a_weight(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_file(comfy(trained()), tmp_path / "lora.safetensors")
    merged = merge_loras(open_source(tiny_flux), [LoraFile(tmp_path / "lora.safetensors", 1.0)])
    name, other = (f"{layer}.weight" for layer in QKV[:2])
    whole = read_tensor(merged, name)
    read_tensor(merged, other)  # so that the first one's changes are kept no more
    asked: list[StoredChange] = []
    read = StoredChange.read
    monkeypatch.setattr(StoredChange, "read", lambda self, weights: asked.append(self) or read(self, weights))
    entry = merged.tensors[name]
    pieces = [entry.read_rows(start, start + 40) for start in range(0, len(whole), 40)]
    torch.testing.assert_close(torch.cat(pieces), whole)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor(2.0).half()]
)
def test_an_alpha_is_one_number_of_any_dtype_and_shape(tiny_flux: Path, tmp_path: Path, alpha: Tensor):
    down, up = drawn(128, 128, 0)
    name = f"lora_transformer_{QKV[0].replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    before, after = merged_weight(tiny_flux, tmp_path / "l.safetensors", tensors, f"{QKV[0]}.weight")
    torch.testing.assert_close(after, before + 0.5 * (2 / RANK) * up @ down, rtol=1e-4, atol=1e-5)


def test_two_loras_add_up(tiny_flux: Path, tmp_path: Path):
    save_file(peft(trained()), tmp_path / "lora.safetensors")
    file = tmp_path / "lora.safetensors"
    both = merge_loras(open_source(tiny_flux), [LoraFile(file, 0.5), LoraFile(file, -0.5)])
    name = f"{QKV[0]}.weight"
    # the two updates cancel up to float32 rounding
    torch.testing.assert_close(
        read_tensor(both, name), weights_of(tiny_flux)[name].float(), rtol=1e-5, atol=1e-5
    )


def test_the_saved_training_config_scales_an_adapter_without_alphas(tiny_flux: Path, tmp_path: Path):
    config = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 2 * RANK,
        "transformer.alpha_pattern": {"ff.net.2": RANK},
    }
    save_file(
        peft(trained()), tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)}
    )
    merged = merge_loras(open_source(tiny_flux), [LoraFile(tmp_path / "lora.safetensors", 1.0)])
    for layer, scale in ((QKV[0], 2.0), ("transformer_blocks.0.ff.net.2", 1.0)):
        down, up = trained()[layer]
        expected = weights_of(tiny_flux)[f"{layer}.weight"].float() + scale * up @ down
        torch.testing.assert_close(read_tensor(merged, f"{layer}.weight"), expected, rtol=1e-5, atol=1e-5)


def test_a_peft_folder_is_read_with_its_config(tiny_flux: Path, tmp_path: Path):
    save_file(peft_without_prefix(trained()), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"r": RANK, "lora_alpha": 3 * RANK, "use_rslora": True})
    )
    merged = merge_loras(open_source(tiny_flux), [LoraFile(tmp_path, 1.0)])
    down, up = trained()[QKV[1]]
    scale = 3 * RANK / RANK**0.5
    expected = weights_of(tiny_flux)[f"{QKV[1]}.weight"].float() + scale * up @ down
    torch.testing.assert_close(read_tensor(merged, f"{QKV[1]}.weight"), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- UNets


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A UNet with SD 1.5's names and a tenth of its width."""
    config = {"cross_attention_dim": 64, "block_out_channels": [32, 32, 64, 64], "norm_num_groups": 8}
    folder = tmp_path_factory.mktemp("sd15") / "unet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **config}))
    shapes = meta_shapes("UNet2DConditionModel", config)
    save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    return open_source(folder)


# diffusers layer -> the same layer under LDM's names
UNET_LAYERS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": "middle_block.1.transformer_blocks.0.attn2.to_out.0",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
}


def unet_adapter(source: Source) -> dict[str, Halves]:
    adapter: dict[str, Halves] = {}
    for seed, layer in enumerate(UNET_LAYERS):
        rows, *rest = source.tensors[f"{layer}.weight"].shape
        down, up = drawn(rows, torch.Size(rest).numel(), seed)
        adapter[layer] = down.reshape(RANK, *rest), up.reshape(rows, RANK, *[1] * (len(rest) - 1))
    return adapter


def old_diffusers(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    """Attention processors as diffusers saved them in 2023; the rest as `lora_layer`s of the time."""
    file: dict[str, Tensor] = {}
    for layer, halves in adapter.items():
        parts = layer.split(".")
        if "attn1" in layer or "attn2" in layer:
            at = next(i for i, part in enumerate(parts) if part.startswith("attn"))
            name = ".".join([*parts[: at + 1], "processor", f"{parts[at + 1]}_lora"])
        else:
            name = f"unet.{layer}.lora"
        file |= {f"{name}.{half}.weight": t.clone() for half, t in zip(("down", "up"), halves, strict=True)}
    return file


def kohya_unet(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    return kohya_names(adapter, "lora_unet_")


def kohya_ldm(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    return kohya_names({UNET_LAYERS[layer]: halves for layer, halves in adapter.items()}, "lora_unet_")


@pytest.mark.parametrize("names", [old_diffusers, kohya_unet, kohya_ldm])
def test_unet_loras_reach_attention_and_convolutions(
    sd15: Source, tmp_path: Path, names: Callable[[Mapping[str, Halves]], dict[str, Tensor]]
):
    adapter = unet_adapter(sd15)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 2)}
    save_file({**names(adapter), **text}, tmp_path / "lora.safetensors")
    merged = merge_loras(sd15, [LoraFile(tmp_path / "lora.safetensors", 1.0)])
    assert merged.warnings == (f"{tmp_path / 'lora.safetensors'}: left out 1 tensor for the text encoders",)
    for layer, (down, up) in adapter.items():
        found = read_tensor(merged, f"{layer}.weight")
        expected = (up.flatten(1) @ down.flatten(1)).reshape(found.shape)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def numbered(adapter: Mapping[str, Halves]) -> dict[str, Tensor]:
    """cloneofsimo's names: the layer's number in the model, in the order in which its trainer found them."""
    return {
        f"unet:{index}:{half}": tensor.clone()
        for index, halves in enumerate(adapter.values())
        for half, tensor in zip(("down", "up"), halves, strict=True)
    }


def numbered_layers() -> list[str]:
    """A UNet's attention and feed-forward layers: down, up, then the middle; the feed-forward before the second
    attention, as diffusers had it then."""
    blocks = [f"down_blocks.{b}.attentions.{a}" for b in range(3) for a in range(2)]
    blocks += [f"up_blocks.{b}.attentions.{a}" for b in range(1, 4) for a in range(3)]
    blocks += ["mid_block.attentions.0"]
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    layers = [f"attn1.{x}" for x in attention] + ["ff.net.0.proj"] + [f"attn2.{x}" for x in attention]
    return [f"{block}.transformer_blocks.0.{layer}" for block in blocks for layer in layers]


def test_numbered_layers_are_found_in_their_trainer_s_order(sd15: Source, tmp_path: Path):
    adapter: dict[str, Halves] = {}
    for seed, name in enumerate(numbered_layers()):
        rows, columns = sd15.tensors[f"{name}.weight"].shape
        adapter[name] = drawn(rows, columns, seed)
    extra = {"text_encoder:0:down": torch.zeros(4, 8), "<s1>": torch.zeros(8)}
    metadata = {"unet": '["CrossAttention", "Attention", "GEGLU"]', "unet:0:rank": "4"}
    save_file({**numbered(adapter), **extra}, tmp_path / "lora.safetensors", metadata=metadata)
    merged = merge_loras(sd15, [LoraFile(tmp_path / "lora.safetensors", 1.0)])
    assert "left out 2 tensors for the text encoders" in merged.warnings[0]
    for layer, (down, up) in adapter.items():
        torch.testing.assert_close(read_tensor(merged, f"{layer}.weight"), up @ down, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- other kinds


def merged_weight(
    tiny_flux: Path, file: Path, tensors: dict[str, Tensor], name: str
) -> tuple[Tensor, Tensor]:
    """A tensor before and after merging an adapter at weight 0.5, float32."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    merged = merge_loras(open_source(tiny_flux), [LoraFile(file, 0.5)])
    return weights_of(tiny_flux)[name].float(), read_tensor(merged, name)


def test_a_bias_of_the_adapter_is_scaled_like_its_matrices(tiny_flux: Path, tmp_path: Path):
    added = torch.linspace(-1, 1, 128)
    tensors = {
        **kohya_diffusers({QKV[0]: drawn(128, 128, 0)}),
        f"lora_transformer_{QKV[0].replace('.', '_')}.lora_up.bias": added,
    }
    before, after = merged_weight(tiny_flux, tmp_path / "l.safetensors", tensors, f"{QKV[0]}.bias")
    torch.testing.assert_close(after, before + 0.5 * added / RANK)  # alpha 1


@pytest.mark.parametrize(
    "spelling", ["lora_magnitude_vector", "lora_magnitude_vector.default.weight", "dora_scale"]
)
def test_dora_sets_the_length_of_every_row(tiny_flux: Path, tmp_path: Path, spelling: str):
    down, up = drawn(128, 128, 0)
    length = torch.linspace(0.5, 2, 128)
    magnitude = length.unsqueeze(1) if spelling == "dora_scale" else length
    tensors = {**peft({QKV[0]: (down, up)}), f"transformer.{QKV[0]}.{spelling}": magnitude}
    before, after = merged_weight(tiny_flux, tmp_path / "l.safetensors", tensors, f"{QKV[0]}.weight")
    turned = before + up @ down
    trained = torch.nn.functional.normalize(turned, dim=1) * length.unsqueeze(1)
    torch.testing.assert_close(after, before + 0.5 * (trained - before), rtol=1e-4, atol=1e-5)


def test_dora_with_other_lengths_than_rows_or_columns_is_refused(tiny_flux: Path, tmp_path: Path):
    name = "transformer_blocks.0.ff.net.2"
    for shape in ((512,), (1, 500)):
        tensors = {
            **peft({name: drawn(128, 512, 0)}),
            f"transformer.{name}.dora_scale": torch.ones(shape),
        }
        error = refused(tiny_flux, tmp_path / "l.safetensors", tensors)
        assert f"of shape {list(shape)}, for 128 rows and 512 columns" in error.message


def test_loha_is_the_product_of_two_products(tiny_flux: Path, tmp_path: Path):
    (b1, a1), (b2, a2) = drawn(128, 128, 0), drawn(128, 128, 1)
    flat = f"lycoris_{QKV[0].replace('.', '_')}"
    tensors = {
        f"{flat}.hada_w1_a": a1,
        f"{flat}.hada_w1_b": b1,
        f"{flat}.hada_w2_a": a2,
        f"{flat}.hada_w2_b": b2,
        f"{flat}.alpha": torch.tensor(2.0),
    }
    before, after = merged_weight(tiny_flux, tmp_path / "l.safetensors", tensors, f"{QKV[0]}.weight")
    expected = before + 0.5 * (2 / RANK) * (a1 @ b1) * (a2 @ b2)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factored", [True, False])
def test_lokr_is_a_kronecker_product(tiny_flux: Path, tmp_path: Path, factored: bool):
    generator = torch.Generator().manual_seed(0)
    w1 = torch.randn(8, 4, generator=generator)
    w2_a, w2_b = torch.randn(16, RANK, generator=generator), torch.randn(RANK, 32, generator=generator)
    flat = f"lycoris_{QKV[0].replace('.', '_')}"
    tensors = {f"{flat}.lokr_w1": w1, f"{flat}.alpha": torch.tensor(2.0)}
    if factored:
        tensors |= {f"{flat}.lokr_w2_a": w2_a, f"{flat}.lokr_w2_b": w2_b}
    else:
        tensors[f"{flat}.lokr_w2"] = w2_a @ w2_b
    before, after = merged_weight(tiny_flux, tmp_path / "l.safetensors", tensors, f"{QKV[0]}.weight")
    scale = 2 / RANK if factored else 1.0  # alpha belongs to a rank
    expected = before + 0.5 * scale * torch.kron(w1, w2_a @ w2_b)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- refusals


def refused(tiny_flux: Path, file: Path, tensors: dict[str, Tensor]) -> InputError:
    save_file(tensors, file)
    with pytest.raises(InputError) as caught:
        merge_loras(open_source(tiny_flux), [LoraFile(file, 1.0)])
    assert str(file) in caught.value.message
    assert caught.value.hint
    return caught.value


def test_a_lora_of_another_family_is_refused(tiny_flux: Path, sd15: Source, tmp_path: Path):
    error = refused(tiny_flux, tmp_path / "l.safetensors", kohya_unet(unet_adapter(sd15)))
    assert "made for a different model" in error.message
    assert error.kind == "lora-mismatch"


def test_a_layer_that_the_model_lacks_is_listed(tiny_flux: Path, tmp_path: Path):
    halves = peft({**trained(), "transformer_blocks.7.attn.to_q": drawn(128, 128, 9)})
    error = refused(tiny_flux, tmp_path / "l.safetensors", halves)
    assert "1 of its 6 layers are not in FluxTransformer2DModel" in error.message
    assert "transformer_blocks.7.attn.to_q" in error.message


def test_a_lora_of_another_width_names_both_shapes(tiny_flux: Path, tmp_path: Path):
    error = refused(tiny_flux, tmp_path / "l.safetensors", peft({QKV[0]: drawn(256, 128, 0)}))
    assert "has matrices [256, 4] and [4, 128]" in error.message
    assert "has shape [128, 128]" in error.message


def test_a_missing_half_is_named(tiny_flux: Path, tmp_path: Path):
    halves = peft(trained())
    del halves[f"transformer.{QKV[2]}.lora_B.weight"]
    assert (
        f"have only half of their LoRA: transformer.{QKV[2]}"
        in refused(tiny_flux, tmp_path / "l.safetensors", halves).message
    )


def test_nan_is_named(tiny_flux: Path, tmp_path: Path):
    halves = peft(trained())
    halves[f"transformer.{QKV[0]}.lora_A.weight"][0, 0] = torch.nan
    error = refused(tiny_flux, tmp_path / "l.safetensors", halves)
    assert (error.kind, error.where) == ("not-finite", f"transformer.{QKV[0]}")


def test_a_lora_of_rank_0_is_refused(tiny_flux: Path, tmp_path: Path):
    halves = {**trained(), QKV[0]: (torch.zeros(0, 128), torch.zeros(128, 0))}
    error = refused(tiny_flux, tmp_path / "l.safetensors", peft(halves))
    assert "a LoRA of rank 0" in error.message


def test_a_truncated_file_is_refused(tiny_flux: Path, tmp_path: Path):
    file = tmp_path / "l.safetensors"
    save_file(peft(trained()), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated") as caught:
        merge_loras(open_source(tiny_flux), [LoraFile(file, 1.0)])
    assert caught.value.kind == "damaged-file"


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_x.lora_mid.weight", "layers have only half of their LoRA: lora_unet_x"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("transformer_blocks.0.qkv_proj.lora_down", "a LoRA in Nunchaku's own form"),
        ("lora_unet_x.lora_down.weight_scale", "a LoRA in 8-bit floats with scales"),
        ("diffusion_model.blocks.0.modulation.diff", "a difference of modulation tables"),
        ("lora_unet_x.lokr_t2", "layers have only half of their LoRA: lora_unet_x"),
        ("lora_unet_x.lokr_t1", "Tucker core"),
        ("lora_controlnet", "Stability's control LoRA"),
        ("diffusion_model.x.set_weight", "that replace the model's own"),
        ("diffusion_model.x.reshape_weight", "a control LoRA, which widens an input"),
        ("unet:12:down", "it numbers 13 layers, but the model has 0"),
        ("something.else", "not part of a LoRA: something.else"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tiny_flux: Path, tmp_path: Path, key: str, kind: str):
    tensors = {**peft(trained()), key: torch.zeros(2)}
    assert kind in refused(tiny_flux, tmp_path / "l.safetensors", tensors).message


def test_a_lora_in_a_gguf_file_is_refused_by_name(tiny_flux: Path, tmp_path: Path):
    (tmp_path / "l.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(InputError, match="a GGUF file, not safetensors"):
        merge_loras(open_source(tiny_flux), [LoraFile(tmp_path / "l.gguf", 1.0)])


def test_a_missing_lora_file_is_named(tiny_flux: Path, tmp_path: Path):
    with pytest.raises(InputError, match="no such LoRA file") as caught:
        merge_loras(open_source(tiny_flux), [LoraFile(tmp_path / "none.safetensors", 1.0)])
    assert caught.value.kind == "not-found"


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir:x/a.safetensors", "dir:x/a.safetensors", 1.0),
        (r"C:\a.safetensors:-1", r"C:\a.safetensors", -1.0),
    ],
)
def test_the_option_is_a_path_and_perhaps_a_weight(text: str, path: str, weight: float):
    assert parse_lora(text) == Lora(path=path, weight=weight)


@pytest.mark.parametrize("text", ["a.safetensors:strong", "a.safetensors:nan", ":1"])
def test_a_weight_that_is_no_number_is_bad_usage(text: str):
    with pytest.raises(UsageError, match="is not a weight"):
        parse_lora(text)


def test_a_colon_in_a_file_s_own_name_is_no_weight(tmp_path: Path):
    file = tmp_path / "my:lora.safetensors"
    file.touch()
    assert parse_lora(str(file)) == Lora(path=str(file), weight=1.0)
    assert parse_lora(f"{file}:0.8") == Lora(path=str(file), weight=0.8)


@pytest.mark.parametrize("text", ["a.safetensors:1e300", "a.safetensors:-1001"])
def test_a_weight_beyond_reason_is_refused_as_the_lora_s(text: str):
    with pytest.raises(UsageError, match=r"weight must be -?1000 or (more|less), not -?1"):
        parse_lora(text)


def test_a_lora_s_hub_id_is_answered_with_how_to_download_it(tiny_flux: Path):
    with pytest.raises(InputError, match="owner/some-lora: no such LoRA file") as caught:
        merge_loras(open_source(tiny_flux), [LoraFile(Path("owner/some-lora"), 1.0)])
    assert "hf download owner/some-lora --local-dir DIR" in str(caught.value.hint)


def test_loras_of_the_command_line_come_after_the_recipe_s():
    recipe = with_overrides(default_recipe("demo"), {"model.loras": [Lora(path="first")]})
    assert [lora.path for lora in override(recipe, {"model.loras": ["second:0.5"]}).model.loras] == [
        "first",
        "second",
    ]
