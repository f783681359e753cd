"""LoRAs on a loaded model: what a folded checkpoint computes, at any strength, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import svdq_cli
from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cpu.build import find_compiler
from svdq_cli.errors import InputError, UsageError
from svdq_cli.experimental.hopper.linear import HopperW4A4Linear
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.inference.backend import Backend
from svdq_cli.inference.load import load_model
from svdq_cli.lora.fold import fold
from svdq_cli.runtime.fused import FusedW4A4Linear
from tests.adapters.test_loras import peft
from tests.lora.layers import FOUR_BIT, MODULATION, QKV, SIXTEEN_BIT, probes, relative, small_lora
from tests.lora.test_fold import saved

EVERY_PLACE = {**FOUR_BIT, **MODULATION, **SIXTEEN_BIT}


BACKENDS = ["reference", "kernels", *(["cpu"] if find_compiler() else [])]


def loaded(path: Path, backend: str) -> Any:
    """A pipeline's converted model, on the CPU: the reference, the CPU engine, or the twins of the kernels."""
    model, _ = load_model(
        open_checkpoint(path),
        dtype=torch.float32,
        backend=Backend(backend, "a test"),  # type: ignore[arg-type]
    )
    return SimpleNamespace(transformer=model)


@torch.no_grad()
def drawn(pipe: Any) -> Tensor:
    """The model's answer to one fixed input."""
    generator = torch.Generator().manual_seed(0)
    return pipe.transformer(
        hidden_states=torch.randn(1, 16, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, 8, 128, generator=generator),
        pooled_projections=torch.randn(1, 128, generator=generator),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]


def lora_file(folder: Path, name: str, *, seed: int = 0) -> Path:
    adapter = small_lora(EVERY_PLACE, seed=seed)
    bias = {f"transformer.{QKV[0]}.lora_B.bias": torch.linspace(-1, 1, 128)}
    return saved(folder / name, {**peft(adapter), **bias})


def state_of(pipe: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


def same_state(pipe: Any, before: dict[str, Tensor]) -> bool:
    after = pipe.transformer.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_computes_what_it_did_and_the_lora(
    converted_flux: Callable[[str], Path], tmp_path: Path, backend: str
):
    """Layer by layer: through a whole 4-bit model, one rounding that falls the other way moves everything after it."""
    base = converted_flux("int4") / "lite"
    pipe, plain = loaded(base, backend), loaded(base, backend)
    svdq_cli.load_lora(pipe, lora_file(tmp_path, "lora.safetensors"), "style")
    assert torch.equal(drawn(pipe), drawn(plain))  # it has no strength yet
    svdq_cli.set_adapters(pipe, {"style": 0.7})
    for name, (down, up) in small_lora(EVERY_PLACE).items():
        x = probes(down.shape[1])
        expected = layer_of(plain, name)(x) + 0.7 * x @ down.T @ up.T
        if name == QKV[0]:
            expected = expected + 0.7 * torch.linspace(-1, 1, 128)
        # results are rounded to bfloat16, 0.1 % on average
        assert relative(layer_of(pipe, name)(x), expected) < 3e-3, name


def layer_of(pipe: Any, name: str) -> Any:
    """The module of a layer, also where a backend has it inside another."""
    converted = {m.plan.name: m for m in pipe.transformer.modules() if hasattr(m, "plan")}
    if name in MODULATION or name not in converted:
        return pipe.transformer.get_submodule(name)
    return converted[name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lora_on_4_bit_layers_alone_is_the_folded_checkpoint(
    converted_flux: Callable[[str], Path], tmp_path: Path, backend: str
):
    file = saved(tmp_path / "lora.safetensors", peft(small_lora(FOUR_BIT)))
    base = converted_flux("int4") / "lite"
    fold(base, [LoraFile(file, 0.7)], tmp_path / "folded")
    pipe = loaded(base, backend)
    svdq_cli.load_lora(pipe, file, "style")
    svdq_cli.set_adapters(pipe, {"style": 0.7})
    torch.testing.assert_close(drawn(pipe), drawn(loaded(tmp_path / "folded", backend)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strengths_change_without_loading_and_removal_leaves_nothing(
    converted_flux: Callable[[str], Path], tmp_path: Path, backend: str
):
    pipe = loaded(converted_flux("int4") / "lite", backend)
    plain, before = drawn(pipe), state_of(pipe)
    svdq_cli.load_lora(pipe, lora_file(tmp_path, "a.safetensors"), "a")
    svdq_cli.load_lora(pipe, lora_file(tmp_path, "b.safetensors", seed=1), "b")
    svdq_cli.set_adapters(pipe, {"a": 0.5})
    half = drawn(pipe)
    svdq_cli.set_adapters(pipe, {"a": 1.0, "b": -0.5})
    both = drawn(pipe)
    svdq_cli.set_adapters(pipe, {"b": -0.5, "a": 1.0})
    # another order of float32 sums may round a hidden number the other way
    assert float((drawn(pipe) - both).norm() / both.norm()) < 0.02
    svdq_cli.set_adapters(pipe, {"a": 0.5, "b": 0.0})
    assert torch.equal(drawn(pipe), half)
    assert not torch.equal(half, plain)
    svdq_cli.unload_lora(pipe, "b")
    assert torch.equal(drawn(pipe), half)
    svdq_cli.set_adapters(pipe, {})
    assert torch.equal(drawn(pipe), plain)
    assert same_state(pipe, before)
    svdq_cli.set_adapters(pipe, {"a": 1.0})
    svdq_cli.unload_lora(pipe, "a")
    assert same_state(pipe, before)
    with pytest.raises(UsageError, match="no LoRA named 'a'"):
        svdq_cli.set_adapters(pipe, {"a": 1.0})


def test_what_fails_changes_nothing(converted_flux: Callable[[str], Path], tmp_path: Path):
    pipe = loaded(converted_flux("int4") / "lite", "reference")
    file = lora_file(tmp_path, "a.safetensors")
    wide = saved(tmp_path / "wide.safetensors", peft(small_lora(FOUR_BIT, rank=600)))
    svdq_cli.load_lora(pipe, file, "a")
    svdq_cli.load_lora(pipe, wide, "wide")
    svdq_cli.load_lora(pipe, wide, "wide too")
    svdq_cli.set_adapters(pipe, {"a": 0.5})
    before = state_of(pipe)
    with pytest.raises(UsageError, match="a LoRA named 'a' is loaded"):
        svdq_cli.load_lora(pipe, file, "a")
    other = peft({"transformer_blocks.9.attn.to_q": small_lora({"x": (128, 128)})["x"]})
    with pytest.raises(InputError, match="made for a different model"):
        svdq_cli.load_lora(pipe, saved(tmp_path / "other.safetensors", other), "other")
    with pytest.raises(UsageError, match="no LoRA named 'other' is loaded"):
        svdq_cli.set_adapters(pipe, {"a": 1.0, "other": 1.0})
    with pytest.raises(UsageError, match="1024 at most"):
        svdq_cli.set_adapters(pipe, {"a": 1.0, "wide": 1.0, "wide too": 1.0})
    assert same_state(pipe, before)


def test_layers_of_one_input_quantize_it_once_again_when_a_lora_is_gone(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    pipe = loaded(converted_flux("int4") / "lite", "kernels")
    attention = pipe.transformer.transformer_blocks[0].attn
    svdq_cli.load_lora(pipe, lora_file(tmp_path, "lora.safetensors"), "style")
    svdq_cli.set_adapters(pipe, {"style": 0.7})
    assert attention.to_q.quantizer is not attention.to_k.quantizer
    svdq_cli.set_adapters(pipe, {})
    assert attention.to_q.quantizer is attention.to_k.quantizer


@pytest.mark.parametrize("shape", [(128,), (1, 128)])
def test_dora_is_measured_against_the_model_whatever_other_loras_are_on(
    converted_flux: Callable[[str], Path], tmp_path: Path, shape: tuple[int, ...]
):
    """Its lengths are those of rows or columns of the model as it was trained on."""
    base, other = converted_flux("int4") / "lite", lora_file(tmp_path, "other.safetensors")
    scale = f"transformer.{QKV[1]}.dora_scale"
    tensors = {**peft(small_lora({QKV[1]: (128, 128)})), scale: torch.full(shape, 0.7)}
    dora, results = saved(tmp_path / "dora.safetensors", tensors), []
    for first in ({}, {"other": 3.0}):
        pipe = loaded(base, "reference")
        svdq_cli.load_lora(pipe, other, "other")
        svdq_cli.set_adapters(pipe, first)
        svdq_cli.load_lora(pipe, dora, "dora")
        svdq_cli.set_adapters(pipe, {"dora": 1.0})
        results.append(layer_of(pipe, QKV[1])(probes(128)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_pipeline_without_converted_layers_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no converted layers"):
        svdq_cli.set_adapters(SimpleNamespace(transformer=torch.nn.Linear(2, 2)), {})  # type: ignore[arg-type]


def test_every_kernel_module_takes_another_branch_and_gives_it_back(converted_flux: Callable[[str], Path]):
    """The rank is padded to each kernel's tiles; the numbers come back as they were."""
    checkpoint = open_checkpoint(converted_flux("int4") / "lite")
    plan = next(plan for plan in checkpoint.layers if plan.name == QKV[0])
    solution: Any = checkpoint.solution(plan)
    for layer in (FusedW4A4Linear(solution), *(HopperW4A4Linear(solution, mode) for mode in HopperMode)):
        before = layer.branch
        assert torch.equal(before.down, solution.down)
        down = torch.cat([before.down, before.down[:4]])
        up = torch.cat([before.up, before.up[:, :4]], dim=1)
        layer.set_branch(type(before)(down, up, before.bias))
        assert layer.plan.rank == 20
        assert torch.equal(layer.branch.down, down)
        assert torch.equal(layer.branch.up, up)
