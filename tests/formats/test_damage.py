"""`svdq check` finds what loads without a complaint and draws noise: in every format, by module or layer."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.writer import report_path
from svdq_cli.cli import run
from svdq_cli.errors import InputError
from svdq_cli.formats import format_named
from svdq_cli.source import open_source

Damage = Callable[[dict[str, Tensor]], None]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def weights_of(folder: Path, name: str) -> Path:
    return folder / "lite" / WEIGHTS if name == "nunchaku-lite" else folder / f"{name}.safetensors"


def damaged(folder: Path, name: str, out: Path, damage: Damage) -> Path:
    """A copy of a converted checkpoint whose tensors were changed behind its header's back."""
    weights = weights_of(folder, name)
    tensors = load_file(weights)
    damage(tensors)
    with safe_open(weights, framework="pt") as file:
        header = file.metadata()
    if name != "nunchaku-lite":
        save_file(tensors, out / "damaged.safetensors", metadata=header)
        return out / "damaged.safetensors"
    shutil.copytree(folder / "lite", out / "damaged")
    save_file(tensors, out / "damaged" / WEIGHTS, metadata=header)
    return out / "damaged"


# Per format: an attention projection, its codes, its smoothing factor, and two biases of one size.
PARTS = {
    "nunchaku-lite": (
        "transformer_blocks.0.attn.to_q",
        "qweight",
        "smooth_factor",
        "transformer_blocks.0.attn.to_k",
    ),
    "nunchaku": (
        "transformer_blocks.0.qkv_proj",
        "qweight",
        "smooth",
        "transformer_blocks.0.qkv_proj_context",
    ),
    "comfy": ("double_blocks.0.img_attn.qkv", "weight", "smooth_factor", "double_blocks.0.txt_attn.qkv"),
}


@pytest.fixture(scope="module")
def smoothed_flux(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion whose smoothing factors are not one everywhere."""
    from svdq_cli.conversion.convert import convert
    from svdq_cli.prepare.options import RunOptions
    from svdq_cli.recipe import Calibration, Output, Quantization, default_recipe

    folder = tmp_path_factory.mktemp("smoothed")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    paths = {
        "nunchaku-lite": folder / "lite",
        **{n: folder / f"{n}.safetensors" for n in ("nunchaku", "comfy")},
    }
    recipe = default_recipe(
        str(tiny_flux),
        calibration=Calibration(
            prompts=str(folder / "prompts.txt"), samples=2, steps=1, height=32, width=32, rows=128
        ),
        quantization=Quantization.model_validate({"rank": 16, "smoothing": "closed-form"}),
        outputs=[Output.model_validate({"format": n, "path": str(p)}) for n, p in paths.items()],
    )
    convert(recipe, tuple(paths.values()), options=RunOptions(device="cpu"))
    return folder


def scramble_codes(name: str) -> Damage:
    module, codes, _, _ = PARTS[name]

    def damage(tensors: dict[str, Tensor]) -> None:
        key = f"{module}.{codes}"
        tensors[key] = tensors[key].flatten().roll(64).reshape(tensors[key].shape).contiguous()

    return damage


def invert_smooth(name: str) -> Damage:
    module, _, smooth, _ = PARTS[name]

    def damage(tensors: dict[str, Tensor]) -> None:
        for suffix in (smooth, f"{smooth}_orig"):
            if f"{module}.{suffix}" in tensors:
                tensors[f"{module}.{suffix}"] = (1 / tensors[f"{module}.{suffix}"].float()).to(torch.bfloat16)

    return damage


def swap_biases(name: str) -> Damage:
    module, _, _, other = PARTS[name]

    def damage(tensors: dict[str, Tensor]) -> None:
        a, b = f"{module}.bias", f"{other}.bias"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return damage


def unpermute_bias(name: str) -> Damage:
    """Rows in another order than the format's: reversed inside the module."""
    module = PARTS[name][0]

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{module}.bias"] = tensors[f"{module}.bias"].flip(0).contiguous()

    return damage


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("harm", [scramble_codes, invert_smooth, swap_biases, unpermute_bias])
def test_what_has_the_right_shape_and_the_wrong_numbers_is_found(
    smoothed_flux: Path, tiny_flux: Path, tmp_path: Path, name: str, harm: Callable[[str], Damage]
):
    path = damaged(smoothed_flux, name, tmp_path, harm(name))
    report = check(path, against=open_source(tiny_flux))
    assert report.status == "failed"
    assert any("attn" in problem.layer or "qkv" in problem.layer for problem in report.problems)
    assert run(f"check {path} --against {tiny_flux} --json -q".split()) == 7


@pytest.mark.parametrize("name", PARTS)
def test_an_undamaged_copy_passes(smoothed_flux: Path, tiny_flux: Path, tmp_path: Path, name: str):
    """Written again, its bytes are not those that the report beside it tells."""
    path = damaged(smoothed_flux, name, tmp_path, lambda tensors: None)
    report_path(path, format_named(name)).unlink(missing_ok=True)
    assert check(path, against=open_source(tiny_flux)).status == "ok"


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda t, module: t.update(stranger=torch.zeros(1)), "does not belong"),
        (
            lambda t, module: t.pop(f"{module}.proj_up" if f"{module}.proj_up" in t else f"{module}.lora_up"),
            "missing",
        ),
        (lambda t, module: t[f"{module}.bias"].fill_(float("nan")), "not finite"),
    ],
    ids=["foreign-tensor", "missing-tensor", "nan"],
)
def test_structure_is_checked_without_a_source(
    smoothed_flux: Path, tmp_path: Path, name: str, harm: Callable[[dict[str, Tensor], str], None], said: str
):
    path = damaged(smoothed_flux, name, tmp_path, lambda tensors: harm(tensors, PARTS[name][0]))
    assert any(PARTS[name][0] in text or said in text for text in complaints(path))


def complaints(path: Path) -> list[str]:
    """What a check finds; of a file too broken to be indexed, why it is refused."""
    try:
        return [f"{problem.layer}: {problem.what}" for problem in check(path).problems]
    except InputError as error:
        return [error.message]


@pytest.mark.parametrize("name", ["nunchaku", "comfy"])
def test_a_truncated_file_is_refused(smoothed_flux: Path, tmp_path: Path, name: str):
    whole = weights_of(smoothed_flux, name).read_bytes()
    path = tmp_path / "short.safetensors"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match="truncated") as caught:
        check(path)
    assert caught.value.kind == "damaged-file"
    assert run(f"check {path} --json -q".split()) == 3


def test_a_pickle_that_is_called_safetensors_is_refused(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps({"weight": list(range(1000))}))
    with pytest.raises(InputError, match="pickle"):
        check(path)


def test_a_16_bit_file_is_no_checkpoint(tiny_flux: Path):
    with pytest.raises(InputError, match="not a checkpoint of a format that svdq reads"):
        check(tiny_flux / WEIGHTS)


def test_another_quantizer_s_file_is_called_by_its_name(tmp_path: Path):
    save_file(
        {"a.weight.absmax": torch.zeros(4), "a.weight.quant_map": torch.zeros(16)}, tmp_path / "b.safetensors"
    )
    with pytest.raises(InputError, match=r"already quantized \(bitsandbytes 4-bit\)"):
        check(tmp_path / "b.safetensors")


def test_a_checkpoint_of_another_size_is_refused(smoothed_flux: Path, tmp_path: Path):
    """The header's config and the tensors contradict each other."""
    import json

    weights = weights_of(smoothed_flux, "nunchaku")
    with safe_open(weights, framework="pt") as file:
        header = file.metadata()
    config = json.loads(header["config"])
    header["config"] = json.dumps({**config, "num_layers": 2})
    save_file(load_file(weights), tmp_path / "other.safetensors", metadata=header)
    with pytest.raises(InputError, match=r"transformer_blocks\.1"):
        check(tmp_path / "other.safetensors")


def test_swapped_biases_that_the_header_records_are_found_without_a_source(
    smoothed_flux: Path, tmp_path: Path
):
    def damage(tensors: dict[str, Tensor]) -> None:
        a, b = (f"transformer_blocks.0.{module}.bias" for module in ("mlp_fc2", "mlp_context_fc2"))
        tensors[a], tensors[b] = tensors[b], tensors[a]

    report = check(damaged(smoothed_flux, "nunchaku", tmp_path, damage))
    assert report.status == "failed"
    assert {problem.layer.rsplit(".", 3)[-3] for problem in report.problems} == {"ff", "ff_context"}
