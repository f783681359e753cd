"""Every family in every format that holds it, both precisions: what is written comes back as it was solved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.checkpoint.row_orders import row_sources
from svdq_cli.conversion.convert import convert
from svdq_cli.families.layouts import LAYOUTS
from svdq_cli.families.layouts.layout import HalvesSwapped, Interleaved, KeysAndValuesByHead
from svdq_cli.formats import all_formats, format_named
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Quantization, default_recipe
from svdq_cli.records import W4A4Plan
from svdq_cli.solve.rebuild import rebuilt_weight
from svdq_cli.source import Source, open_source, read_tensor
from tests.formats.solutions import differing_fields, same_bits

CASES = [
    (layout.family, layout.format, precision.name)
    for layout in LAYOUTS
    for precision in format_named(layout.format).precisions
]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, tiny_flux: Path) -> Callable[[str], Path]:
    """By family, the quantized component's folder of its tiny pipeline."""
    from tests.tiny_families import tiny_pipeline

    made: dict[str, Path] = {"flux": tiny_flux / "transformer"}

    def of(family: str) -> Path:
        if family not in made:
            folder = tiny_pipeline(family, tmp_path_factory.mktemp(family) / family)
            made[family] = folder / ("unet" if (folder / "unet").is_dir() else "transformer")
        return made[family]

    return of


@pytest.fixture(scope="module")
def converted(
    model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], dict[str, Path]]:
    """By family and precision, one conversion to Lite and every format that holds it: paths by format."""
    made: dict[tuple[str, str], dict[str, Path]] = {}

    def of(family: str, precision: str) -> dict[str, Path]:
        if (family, precision) not in made:
            folder = tmp_path_factory.mktemp("out")
            names = ["nunchaku-lite", *(name for f, name, p in CASES if (f, p) == (family, precision))]
            paths = {
                name: folder / (name if name == "nunchaku-lite" else f"{name}.safetensors") for name in names
            }
            recipe = default_recipe(
                str(model_of(family)),
                quantization=Quantization.model_validate(
                    {"precision": precision, "rank": 16, "effort": "datafree"}
                ),
                outputs=[Output.model_validate({"format": n, "path": str(p)}) for n, p in paths.items()],
            )
            report = convert(recipe, tuple(paths.values()), options=RunOptions(device="cpu"))
            assert [output.format for output in report.outputs] == names
            made[family, precision] = paths
        return made[family, precision]

    return of


@pytest.mark.parametrize(("family", "name", "precision"), CASES)
def test_what_is_written_is_the_solution_bit_for_bit(converted, family: str, name: str, precision: str):
    """Lite, which stores each layer on its own, is the witness."""
    paths = converted(family, precision)
    lite, other = open_checkpoint(paths["nunchaku-lite"]), open_checkpoint(paths[name])
    assert (other.format.name, other.family, other.rank) == (name, family, 16)
    witnessed = {layer.name: layer for layer in lite.layers}
    both = [layer for layer in other.layers if layer.name in witnessed]
    assert len(both) > len(other.layers) / 2
    assert [layer for layer in both if witnessed[layer.name] != layer] == []
    wrong = {
        layer.name: fields
        for layer in both
        if (fields := differing_fields(lite.solution(layer), other.solution(layer)))
    }
    assert wrong == {}


@pytest.mark.parametrize(("family", "name", "precision"), CASES)
def test_what_stays_at_16_bits_comes_back_under_its_own_name(
    converted, model_of, family: str, name: str, precision: str
):
    checkpoint = open_checkpoint(converted(family, precision)[name])
    source: Source = open_source(model_of(family))
    quantized = {f"{layer.name}.{kind}" for layer in checkpoint.layers for kind in ("weight", "bias")}
    assert set(checkpoint.kept_names()) == source.tensors.keys() - quantized
    for tensor in checkpoint.kept_names():
        assert same_bits(checkpoint.kept_tensor(tensor), read_tensor(source, tensor).to(torch.bfloat16)), (
            tensor
        )


@pytest.mark.parametrize(("family", "name", "precision"), CASES)
def test_the_check_rebuilds_every_layer(converted, model_of, family: str, name: str, precision: str):
    report = check(converted(family, precision)[name], against=open_source(model_of(family)))
    assert report.problems == ()
    assert report.format == name
    assert report.layer_error is not None
    assert len(report.layer_error) == report.layers
    # 4 bits of a Gaussian weight without outliers cost about 0.1
    assert max(report.layer_error.values()) < 0.2


def test_every_single_file_format_has_a_layout():
    wanting = [fmt for fmt in all_formats() if not (fmt.own_names or fmt.original_names)]
    assert {layout.format for layout in LAYOUTS} == {fmt.name for fmt in wanting}


# ------------------------------------------------------------------------------------------------- single rules


def stored(checkpoint: Checkpoint, name: str) -> Tensor:
    return read_tensor(checkpoint.source, name)


def test_z_image_stacks_hidden_before_gate_for_nunchaku(converted):
    classic = open_checkpoint(converted("z-image", "nvfp4")["nunchaku"])
    module = next(m for m in classic.file.modules if m.name == "layers.0.feed_forward.net.0.proj")
    assert [plan.name.rsplit(".", 1)[1] for plan in module.layers] == ["w3", "w1"]


def test_fused_projections_store_outer_scales_by_row_and_others_one_for_the_tensor(converted):
    tensors = open_checkpoint(converted("z-image", "nvfp4")["nunchaku"]).source.tensors
    assert "layers.0.attention.to_qkv.wcscales" in tensors
    assert "layers.0.attention.to_qkv.wtscale" not in tensors
    assert "layers.0.feed_forward.net.2.wtscale" in tensors
    assert "layers.0.feed_forward.net.2.wcscales" not in tensors
    assert not any(name.endswith("qkv.bias") for name in tensors)  # the model has none there


def test_sdxl_stores_every_outer_scale_by_row(converted):
    tensors = open_checkpoint(converted("sdxl", "nvfp4")["nunchaku"]).source.tensors
    assert not any(name.endswith("wtscale") for name in tensors)
    assert any(name.endswith("attn2.to_q.wcscales") for name in tensors)


def test_comfy_stores_modulations_in_their_own_order_and_swaps_the_final_norm(converted, model_of):
    checkpoint = open_checkpoint(converted("flux", "int4")["comfy"])
    source = open_source(model_of("flux"))
    name = "transformer_blocks.0.norm1.linear"
    (module,) = checkpoint.file.parts_of(name)
    assert module.name == "double_blocks.0.img_mod.lin"
    exact = read_tensor(source, f"{name}.weight").float()
    rounded = rebuilt_weight(checkpoint.solution(checkpoint.by_name[name]))
    assert float((rounded - exact).norm() / exact.norm()) < 0.1  # 4 bits with a scale per 64
    scale, shift = read_tensor(source, "norm_out.linear.weight").chunk(2)
    assert same_bits(stored(checkpoint, "final_layer.adaLN_modulation.1.weight"), torch.cat([shift, scale]))


def test_comfy_joins_the_branches_of_a_single_blocks_first_matrix(converted):
    """q, k, v share a down projection, the MLP has its own: their ranks add up and the rest of `up` is zero."""
    checkpoint = open_checkpoint(converted("flux", "int4")["comfy"])
    module = next(m for m in checkpoint.file.modules if m.name == "single_blocks.0.linear1")
    assert module.plan.linear.out_features == 3 * 128 + 512
    plan = module.plan
    assert isinstance(plan, W4A4Plan)
    assert plan.rank == 32
    assert stored(checkpoint, "single_blocks.0.linear1.proj_down").shape == (128, 32)


def test_sana_pads_what_its_engine_reads_in_tiles(converted):
    checkpoint = open_checkpoint(converted("sana", "int4")["nunchaku"])
    shapes = {module.name: module.plan.linear for module in checkpoint.file.modules}
    inverted = shapes["transformer_blocks.0.ff.inverted_conv"]
    assert inverted.out_features % 128 == 0
    assert inverted.in_features % 128 == 0
    depth = checkpoint.source.tensors["transformer_blocks.0.ff.depth_conv.weight"]
    assert depth.shape[1:] == (3, 3, 1)


def test_row_orders():
    assert row_sources(Interleaved(2), 6) == [0, 3, 1, 4, 2, 5]
    assert row_sources(HalvesSwapped(), 4) == [2, 3, 0, 1]
    # two heads of one channel: q, then k0 v0 k1 v1
    assert row_sources(KeysAndValuesByHead(1), 6) == [0, 1, 2, 4, 3, 5]
    with pytest.raises(ValueError, match="do not divide into 2 parts"):
        row_sources(Interleaved(2), 5)
