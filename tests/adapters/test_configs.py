"""What a training config says of an adapter, and what svdq says of the adapter: patterns are regular expressions whose
cost is bounded, an adapter that does nothing is called so, and two keys that claim the same are named."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.errors import InputError
from svdq_cli.source import open_source, read_tensor
from tests.adapters.test_loras import QKV, RANK, drawn, kohya_diffusers, peft, refused, weights_of

LAYER = QKV[0]


def folder_of(tmp_path: Path, said: dict[str, object]) -> Path:
    """A peft folder of one layer with this config."""
    down, up = drawn(128, 128, 0)
    halves = {f"base_model.model.{LAYER}.lora_A.weight": down, f"base_model.model.{LAYER}.lora_B.weight": up}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, **said})
    )
    return tmp_path


def scale_of(tiny_flux: Path, folder: Path) -> float:
    """By what the folder's product was multiplied when it was merged."""
    down, up = drawn(128, 128, 0)
    merged = merge_loras(open_source(tiny_flux), [LoraFile(folder, 1.0)])
    added = read_tensor(merged, f"{LAYER}.weight") - weights_of(tiny_flux)[f"{LAYER}.weight"].float()
    return float((added * (up @ down)).sum() / (up @ down).square().sum())


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        # peft matches the end of the layer's name, whole parts of it, and takes the first that does
        ({"to_q": 8}, 8),
        ({"attn.to_q": 8, "to_q": 16}, 8),
        ({"attnxto_q": 8}, RANK),
        ({"attn.to.q": 8}, 8),
        ({"o_q": 8}, RANK),
        ({"to_": 8}, RANK),
        ({r"transformer_blocks\.\d+\.attn\.to_q": 8}, 8),
        ({r"^transformer_blocks\.\d\..*": 8}, 8),
        ({r"^attn\.to_q": 8}, RANK),
        ({"single_.*": 8, ".*": 12}, 12),
        ({"to_k|to_q": 8}, 8),
        ({"": 8}, RANK),
    ],
)
def test_a_pattern_means_what_it_does_in_peft(
    tiny_flux: Path, tmp_path: Path, patterns: dict[str, int], alpha: int
):
    from peft.utils.other import get_pattern_key

    assert patterns.get(get_pattern_key(list(patterns), LAYER), RANK) == alpha
    found = scale_of(tiny_flux, folder_of(tmp_path, {"alpha_pattern": patterns}))
    assert found == pytest.approx(alpha / RANK, rel=1e-4)


def test_peft_s_defaults_hold_where_a_config_is_silent(tiny_flux: Path, tmp_path: Path):
    folder = folder_of(tmp_path, {})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert scale_of(tiny_flux, folder) == pytest.approx(8 / RANK, rel=1e-4)


_ENDLESS = r"(\w|\w\w|.)*(\w|\w\w|.)*(\w|.)*(\w|.)*[!?]"


@pytest.mark.parametrize("pattern", [_ENDLESS, "a" * 2000])
def test_a_pattern_that_takes_too_long_is_stopped_and_named(tiny_flux: Path, tmp_path: Path, pattern: str):
    folder = folder_of(tmp_path, {"alpha_pattern": {pattern: 8}})
    started = time.process_time()
    with pytest.raises(InputError, match="takes too long to match") as caught:
        merge_loras(open_source(tiny_flux), [LoraFile(folder, 1.0)])
    # Python's own engine does not end within a day
    assert time.process_time() - started < 10
    assert str(folder / "adapter_config.json") in caught.value.message


@pytest.mark.parametrize(
    "pattern", [r"(\w+\.?)+!", r"(\w+\.?)+[!?]", r"(.*)*!", r"((a|\w)*)*!", "(" * 99 + "a" + ")*" * 99]
)
def test_a_pattern_that_only_looks_endless_is_answered(tiny_flux: Path, tmp_path: Path, pattern: str):
    started = time.process_time()
    folder = folder_of(tmp_path, {"alpha_pattern": {pattern: 8}})
    assert scale_of(tiny_flux, folder) == pytest.approx(1, rel=1e-4)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("pattern", ["(", "[", "*", r"\8", "(?P<a>.)(?P<a>.)"])
def test_a_pattern_that_is_none_is_named(tiny_flux: Path, tmp_path: Path, pattern: str):
    with pytest.raises(InputError, match="is not a regular expression"):
        merge_loras(
            open_source(tiny_flux), [LoraFile(folder_of(tmp_path, {"alpha_pattern": {pattern: 8}}), 1.0)]
        )


@pytest.mark.parametrize("alpha", ["8", True, 10**400, None])
def test_an_alpha_that_is_no_number_is_named(tiny_flux: Path, tmp_path: Path, alpha: object):
    with pytest.raises(InputError, match=r"lora_alpha is .*, not a number"):
        merge_loras(open_source(tiny_flux), [LoraFile(folder_of(tmp_path, {"lora_alpha": alpha}), 1.0)])


# ------------------------------------------------------------------------------------------------- said of it


def warnings_of(tiny_flux: Path, file: Path, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    return merge_loras(open_source(tiny_flux), [LoraFile(file, 1.0)]).warnings


def test_an_adapter_that_changes_nothing_is_called_so(tiny_flux: Path, tmp_path: Path):
    file = tmp_path / "l.safetensors"
    adapter = kohya_diffusers({name: drawn(128, 128, 0) for name in QKV})
    assert warnings_of(tiny_flux, file, adapter) == ()
    (zero_alpha,) = warnings_of(
        tiny_flux, file, {key: t * 0 if key.endswith("alpha") else t for key, t in adapter.items()}
    )
    assert "it changes nothing: alpha is 0" in zero_alpha
    (zero_up,) = warnings_of(
        tiny_flux, file, {key: t * 0 if "lora_up" in key else t for key, t in adapter.items()}
    )
    assert "it changes nothing" in zero_up
    (one,) = warnings_of(tiny_flux, file, {key: t * 0 if "to_q" in key else t for key, t in adapter.items()})
    assert "1 of 3 layers change nothing" in one
    assert "to_q" in one


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{}.lora_A.weight", "{}.lora_A.default.weight"),
        ("{}.lora_A.default.weight", "{}.lora_A.other.weight"),
        ("{}.lora_A.weight", "{}.lora_down.weight"),
        ("{}.alpha", "{}.lora_alpha"),
        ("{}.dora_scale", "{}.lora_magnitude_vector"),
        ("{}.lora_A.weight", "diffusion_model.{}.lora_A.weight"),
    ],
)
def test_two_keys_that_claim_the_same_are_both_named(
    tiny_flux: Path, tmp_path: Path, first: str, second: str
):
    down, up = drawn(128, 128, 0)
    sizes = {"A": down, "n": down, "a": torch.tensor(1.0), "e": torch.ones(128), "r": torch.ones(128)}
    tensors = {f"transformer.{LAYER}.lora_A.weight": down, f"transformer.{LAYER}.lora_B.weight": up}
    for key in (first, second):
        name = key.format(LAYER) if key.startswith("diff") else f"transformer.{key.format(LAYER)}"
        kind = "A" if ".lora_A" in key or "lora_down" in key else key[-1]
        tensors[name] = sizes[kind].clone()
        if key.startswith("diff"):
            tensors[name.replace("lora_A", "lora_B")] = up.clone()
    error = refused(tiny_flux, tmp_path / "l.safetensors", tensors)
    named = [key for key in tensors if f"{key} " in error.message or f"{key}:" in error.message]
    assert len(named) == 2, error.message
    assert "keep one of the two" in str(error.hint)


# ------------------------------------------------------------------------------------------------- whole differences


def test_whole_differences_of_weights_biases_and_norms_are_added(tiny_flux: Path, tmp_path: Path):
    """As ComfyUI extracts them, and as LyCORIS trains norms."""
    norm = "transformer_blocks.0.attn.norm_q"
    down, up = drawn(128, 128, 0)
    added = {
        f"{LAYER}.weight": torch.randn(128, 128),
        f"{LAYER}.bias": torch.randn(128),
        f"{QKV[1]}.weight": up @ down,
        f"{QKV[1]}.bias": torch.randn(128),
        f"{norm}.weight": torch.randn(64),
    }
    file = tmp_path / "l.safetensors"
    tensors = {
        f"diffusion_model.{LAYER}.diff": added[f"{LAYER}.weight"],
        f"diffusion_model.{LAYER}.diff_b": added[f"{LAYER}.bias"],
        # a difference of the bias beside factors is not scaled with them
        f"diffusion_model.{QKV[1]}.lora_down.weight": down * RANK,
        f"diffusion_model.{QKV[1]}.lora_up.weight": up,
        f"diffusion_model.{QKV[1]}.alpha": torch.tensor(1.0),
        f"diffusion_model.{QKV[1]}.diff_b": added[f"{QKV[1]}.bias"],
        f"lycoris_{norm.replace('.', '_')}.w_norm": added[f"{norm}.weight"],
    }
    save_file(tensors, file)
    merged = merge_loras(open_source(tiny_flux), [LoraFile(file, 0.5)])
    before = weights_of(tiny_flux)
    for name, tensor in added.items():
        expected = before[name].float() + 0.5 * tensor
        torch.testing.assert_close(read_tensor(merged, name), expected, rtol=1e-4, atol=1e-4)
    assert sum(not torch.equal(read_tensor(merged, name), before[name]) for name in before) == len(added)


def test_a_difference_of_another_size_is_refused(tiny_flux: Path, tmp_path: Path):
    file = tmp_path / "l.safetensors"
    error = refused(tiny_flux, file, {f"diffusion_model.{LAYER}.diff": torch.ones(128, 64)})
    assert "has matrices [128, 64]" in error.message
    error = refused(tiny_flux, file, {f"diffusion_model.{LAYER}.diff_b": torch.ones(3)})
    assert "its bias has 3 values" in error.message
    error = refused(tiny_flux, file, {"transformer_blocks.0.attn.norm_q.diff": torch.ones(3)})
    assert "its difference has 3 values" in error.message


# ------------------------------------------------------------------------------------------------- control LoRAs


@pytest.mark.parametrize("norms", [True, False])
def test_a_control_lora_is_called_one(tiny_flux: Path, tmp_path: Path, norms: bool):
    """FLUX.1-Depth-dev-lora: BFL names, an input twice as wide, biases, and the scales of norms as they are."""
    tensors = {
        "img_in.lora_A.weight": torch.ones(4, 32),
        "img_in.lora_B.weight": torch.ones(128, 4),
        "img_in.lora_B.bias": torch.ones(128),
    }
    if norms:
        tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(64)
    error = refused(tiny_flux, tmp_path / "l.safetensors", tensors)
    assert (
        "control LoRA, which widens an input: img_in reads 32 values, but x_embedder of this model reads 16"
        in error.message
    )
    assert error.kind == "lora-mismatch"


def test_integers_are_no_adapter(tiny_flux: Path, tmp_path: Path):
    tensors = {key: tensor.to(torch.int8) for key, tensor in peft({LAYER: drawn(128, 128, 0)}).items()}
    assert "is stored as I8" in refused(tiny_flux, tmp_path / "l.safetensors", tensors).message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["lora", "lokr", "dora"])
def test_adapters_in_8_bit_floats_are_read(tiny_flux: Path, tmp_path: Path, dtype: torch.dtype, kind: str):
    down, up = (half.to(dtype) for half in drawn(128, 128, 0))
    flat = f"lycoris_{LAYER.replace('.', '_')}"
    before = weights_of(tiny_flux)[f"{LAYER}.weight"].float()
    match kind:
        case "lokr":
            w1, w2 = up[:16].float(), down[:, :32].float().repeat(2, 1)
            tensors = {f"{flat}.lokr_w1": w1.to(dtype), f"{flat}.lokr_w2": w2.to(dtype)}
            expected = before + torch.kron(w1, w2)
        case _:
            tensors = {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            expected = before + up.float() @ down.float()
    if kind == "dora":
        tensors[f"{flat}.dora_scale"] = torch.ones(128, 1).to(dtype)
        expected = torch.nn.functional.normalize(expected, dim=1)
    file = tmp_path / "l.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    merged = merge_loras(open_source(tiny_flux), [LoraFile(file, 1.0)])
    torch.testing.assert_close(read_tensor(merged, f"{LAYER}.weight"), expected, rtol=1e-4, atol=1e-4)
