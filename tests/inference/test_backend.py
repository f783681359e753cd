"""Which backend runs a checkpoint, and that both compute the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.cpu.build import find_compiler
from svdq_cli.errors import EnvironmentLacksError, UsageError
from svdq_cli.evaluation.images import compare
from svdq_cli.experimental.hopper.choice import ModeMeasurement
from svdq_cli.experimental.hopper.linear import HopperW4A4Linear
from svdq_cli.experimental.hopper.modes import HopperMode
from svdq_cli.gpu.architectures import architecture
from svdq_cli.inference.backend import Backend, _on_kernels, choose_backend
from svdq_cli.inference.load import load_model, load_pipeline
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.prepare.defaults import evaluation_recipe
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prompts import chosen_prompts
from svdq_cli.prepare.sampling import sampling_for, with_model_sampling
from svdq_cli.recipe import Quantization, default_recipe
from svdq_cli.records import ignore_events
from svdq_cli.runtime.cpu_fused import CpuW4A4Linear, FeedForwardBesideAttention
from svdq_cli.runtime.fused import FusedW4A4Linear, FusedW4A16Linear
from svdq_cli.runtime.kernel_linear import FusedFeedForward
from svdq_cli.runtime.linear import W4A4Linear
from tests.tiny import LATENT_CHANNELS, TEXT_WIDTH

CPU = torch.device("cpu")
REFERENCES = Backend("kernels", "the kernels' twins on a CPU")


def flux_inputs() -> dict[str, torch.Tensor]:
    """One picture of 3 x 3 tokens with 5 tokens of text."""
    generate_images = torch.Generator().manual_seed(0)
    places = torch.stack(
        torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(3.0), indexing="ij"), -1
    )
    return {
        "hidden_states": torch.randn(1, 9, 4 * LATENT_CHANNELS, generator=generate_images),
        "encoder_hidden_states": torch.randn(1, 5, TEXT_WIDTH, generator=generate_images),
        "pooled_projections": torch.randn(1, TEXT_WIDTH, generator=generate_images),
        "timestep": torch.tensor([0.5]),
        "img_ids": places.reshape(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }


@pytest.fixture(scope="module")
def converted(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "int4"
    convert(default_recipe(str(tiny_flux)), path, options=RunOptions(device="cpu"))
    return path


@pytest.fixture(scope="module")
def checkpoint(converted: Path) -> Checkpoint:
    return open_checkpoint(converted)


def test_the_reference_backend_is_taken_when_asked_for():
    assert choose_backend("reference", CPU, torch.bfloat16) == Backend(
        "reference", "plain torch on cpu, as asked"
    )


def test_kernels_without_a_gpu_are_refused():
    with pytest.raises(EnvironmentLacksError, match="need an NVIDIA GPU, not cpu"):
        choose_backend("kernels", CPU, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_kernels_on_a_gpu_that_is_not_there_are_refused():
    with pytest.raises(EnvironmentLacksError, match="torch sees no NVIDIA GPU"):
        choose_backend("kernels", torch.device("cuda"), torch.bfloat16)


def test_an_unknown_backend_is_refused_with_the_names(converted: Path):
    with pytest.raises(UsageError, match="'triton'") as refusal:
        load_pipeline(converted, device="cpu", backend="triton")
    assert refusal.value.hint == "use auto, kernels, kernels:exact, kernels:w4a8, kernels:fp8, cpu, reference"


def test_the_model_on_the_kernels_computes_what_it_computes_in_plain_torch(checkpoint: Checkpoint):
    reference, none = load_model(checkpoint, dtype=torch.float32, backend=Backend("reference", ""))
    fused, refused = load_model(checkpoint, dtype=torch.float32, backend=REFERENCES)
    assert (none, refused) == ({}, {})
    block = fused.get_submodule("transformer_blocks.0")
    assert isinstance(block.get_submodule("attn.to_q"), FusedW4A4Linear)
    assert isinstance(block.get_submodule("norm1.linear"), FusedW4A16Linear)
    assert isinstance(block.get_submodule("ff"), FusedFeedForward)
    inputs = flux_inputs()
    with torch.no_grad():
        wanted, found = reference(**inputs).sample, fused(**inputs).sample
    # Hidden vectors now and then round to the neighboring bfloat16, and codes of the next layer with them
    assert (found - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_the_model_on_the_cpu_engine_computes_what_its_layers_compute_one_by_one(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    def loaded() -> nn.Module:
        return load_model(checkpoint, dtype=torch.bfloat16, backend=Backend("cpu", ""))[0]

    fused = loaded()
    monkeypatch.setattr("svdq_cli.inference.load.fuse_feed_forwards", lambda _: 0)
    layers = loaded()
    block = fused.get_submodule("single_transformer_blocks.0")
    assert isinstance(block.get_submodule("proj_out"), FeedForwardBesideAttention)
    assert isinstance(layers.get_submodule("single_transformer_blocks.0.proj_mlp"), CpuW4A4Linear)
    inputs = {
        name: value if name.endswith("_ids") else value.bfloat16() for name, value in flux_inputs().items()
    }
    with torch.no_grad():
        assert torch.equal(fused(**inputs).sample, layers(**inputs).sample)


@pytest.mark.parametrize("mode", [None, HopperMode.EXACT], ids=["portable", "hopper"])
def test_q_k_and_v_of_a_loaded_model_quantize_their_input_once(
    checkpoint: Checkpoint, mode: HopperMode | None
):
    model, _ = load_model(checkpoint, dtype=torch.float32, backend=Backend("kernels", "", mode))
    for names in (
        [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")],
        [f"transformer_blocks.0.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")],
        [f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")],
    ):
        assert len({id(model.get_submodule(name).quantizer) for name in names}) == 1
    # The MLP beside them has a branch of its own
    first = model.get_submodule("single_transformer_blocks.0.attn.to_q")
    assert model.get_submodule("single_transformer_blocks.0.proj_mlp").quantizer is not first.quantizer


def test_layers_that_the_kernels_cannot_run_stay_in_plain_torch_and_are_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("svdq_cli.runtime.operands.ROW_TILE", 96)
    model, refused = load_model(checkpoint, dtype=torch.float32, backend=REFERENCES)
    name, reason = next(iter(refused.items()))
    assert reason.endswith("is not a multiple of 96")
    assert isinstance(model.get_submodule(name), W4A4Linear)


def test_the_embedded_models_images_are_the_reference_backends(tmp_path: Path):
    quantization = Quantization.model_validate({"effort": "datafree", "rank": 32})
    recipe = default_recipe("demo", quantization=quantization)
    convert(recipe, tmp_path / "int4", options=RunOptions(device="cpu"))
    checkpoint = open_checkpoint(tmp_path / "int4")
    drawing = with_model_sampling(evaluation_recipe(checkpoint, "demo"), checkpoint.source, held_out=True)
    prompts = chosen_prompts(drawing, RunOptions(device="cpu"), ignore_events).texts[:2]

    def images(backend: Backend):
        pipe = load_pipeline(tmp_path / "int4", device="cpu", dtype=torch.float32)
        pipe.register_modules(transformer=load_model(checkpoint, dtype=torch.float32, backend=backend)[0])
        return generate_images(pipe, prompts, settings=sampling_for(drawing, checkpoint.source).settings)

    reference = images(Backend("reference", ""))
    for mode in (None, HopperMode.EXACT):
        assert compare(reference, images(Backend("kernels", "", mode))).psnr.mean >= 45


# ------------------------------------------------------------------------------------------ Hopper's modes


@pytest.mark.parametrize("mode", HopperMode, ids=lambda mode: mode.label)
def test_the_model_runs_in_every_mode_of_hopper(checkpoint: Checkpoint, mode: HopperMode):
    reference, _ = load_model(checkpoint, dtype=torch.float32, backend=Backend("reference", ""))
    found, refused = load_model(checkpoint, dtype=torch.float32, backend=Backend("kernels", "", mode))
    assert refused == {}
    block = found.get_submodule("transformer_blocks.0")
    assert isinstance(block.get_submodule("attn.to_q"), HopperW4A4Linear)
    assert isinstance(block.get_submodule("norm1.linear"), FusedW4A16Linear)
    fuses = mode == HopperMode.EXACT  # other modes need a whole row before they quantize any of it
    assert isinstance(block.get_submodule("ff"), FusedFeedForward) == fuses
    inputs = flux_inputs()
    with torch.no_grad():
        wanted, result = reference(**inputs).sample, found(**inputs).sample
    # Modes with 8-bit activations round other numbers than the reference, which follows the checkpoint
    assert (result - wanted).norm() <= (0.01 if fuses else 0.2) * wanted.norm()


def test_a_mode_of_hopper_is_taken_when_asked_for_and_refused_elsewhere():
    found = _on_kernels(architecture("sm_90a"), HopperMode.W4A8)
    assert found.mode == HopperMode.W4A8
    assert found.reason.startswith(
        "CUDA kernels for sm_90a; int4 in mode w4a8, as asked: 4-bit weights exact"
    )
    with pytest.raises(EnvironmentLacksError, match="mode w4a8 needs a Hopper GPU"):
        _on_kernels(architecture("sm_89"), HopperMode.W4A8)
    assert _on_kernels(architecture("sm_89"), None) == Backend("kernels", "CUDA kernels for sm_89")


def test_hoppers_default_is_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    measured = (ModeMeasurement("fp8", 50_000.0, 40.0), ModeMeasurement("exact", 60_000.0, 100.0))
    for found, mode in (((), None), (measured, HopperMode.FP8)):
        monkeypatch.setattr("svdq_cli.inference.backend.measured_modes", lambda found=found: found)
        assert _on_kernels(architecture("sm_90a"), None).mode == mode
