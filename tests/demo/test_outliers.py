"""The stress variant computes the same function and is harder to round to 4 bits."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false
import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from svdq_cli.demo.outliers import add_outliers, export_demo
from tools.train_demo.accuracy import MODEL
from tools.train_demo.denoiser import SIDE, WIDTH, image_ids


def forward(transformer: FluxTransformer2DModel) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, SIDE * SIDE, transformer.config.in_channels),
            timestep=torch.tensor([0.9, 0.3]),
            pooled_projections=torch.randn(2, WIDTH),
            encoder_hidden_states=torch.randn(2, 12, WIDTH),
            txt_ids=torch.zeros(12, 3),
            img_ids=image_ids(torch.device("cpu")),
            return_dict=False,
        )[0]


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    return ((approximation - exact).norm() / exact.norm()).item()


@pytest.fixture(scope="module")
def original() -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(MODEL / "transformer", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def variant(original) -> FluxTransformer2DModel:
    variant = copy.deepcopy(original)
    add_outliers(variant)
    return variant


def block_linears(transformer: FluxTransformer2DModel) -> dict[str, nn.Linear]:
    return {
        name: part
        for name, part in transformer.named_modules()
        if isinstance(part, nn.Linear) and "transformer_blocks" in name and ".norm" not in name
    }


def input_peaks(transformer: FluxTransformer2DModel) -> dict[str, float]:
    """Largest channel over median channel of every block linear's input, by absolute maximum."""
    peaks: dict[str, float] = {}

    def watch(name):
        def note(_, inputs):
            channels = inputs[0].abs().flatten(0, -2).amax(dim=0)
            peaks[name] = (channels.max() / channels.median()).item()

        return note

    hooks = [part.register_forward_pre_hook(watch(name)) for name, part in block_linears(transformer).items()]
    forward(transformer)
    for hook in hooks:
        hook.remove()
    return peaks


def round_to_int4(values: Tensor, *, group: int = 64) -> Tensor:
    """Round to nearest in [-7, 7] with one scale per `group` along the last dimension."""
    grouped = values.unflatten(-1, (-1, group))
    scale = grouped.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 7
    return ((grouped / scale).round() * scale).flatten(-2)


def rounded_w4a4(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    transformer = copy.deepcopy(transformer)
    for linear in block_linears(transformer).values():
        linear.weight.data = round_to_int4(linear.weight.data)
        linear.register_forward_pre_hook(lambda _, inputs: (round_to_int4(inputs[0]),))
    return transformer


def test_the_variant_computes_the_same_function(original, variant):
    assert relative_error(forward(variant), forward(original)) < 1e-4  # float32 sums in another scale


def test_the_variant_has_outlier_channels_where_the_original_has_fewer(original, variant):
    before, after = input_peaks(original), input_peaks(variant)
    scaled = [name for name in before if not name.endswith(("ff.net.2", "ff_context.net.2"))]
    assert sum(after[name] > 10 for name in scaled) > 0.9 * len(scaled)
    assert sum(after[name] > before[name] for name in scaled) > 0.9 * len(scaled)


def test_plain_rounding_to_4_bits_hurts_the_variant_more(original, variant):
    exact = forward(original)
    plain, stressed = (relative_error(forward(rounded_w4a4(model)), exact) for model in (original, variant))
    assert stressed > 1.5 * plain


def test_the_same_seed_makes_the_same_variant(original, variant):
    again = copy.deepcopy(original)
    add_outliers(again)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), variant.parameters(), strict=True))


def test_the_exported_variant_says_what_it_is(tmp_path, variant):
    folder = export_demo(tmp_path / "stress", outliers=True)
    assert "stress variant" in (folder / "README.md").read_text(encoding="utf-8")
    exported = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    assert all(torch.equal(a, b) for a, b in zip(exported.parameters(), variant.parameters(), strict=True))
