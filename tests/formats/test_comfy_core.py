"""comfy-core files: what comfy-kitchen reads in them, and what its eager operators compute, held as golden vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats import format_named
from svdq_cli.inference.load import load_pipeline
from svdq_cli.pack.kitchen import text_bytes
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Quantization, default_recipe
from svdq_cli.records import (
    Int4,
    LayerPlan,
    Linear,
    NvFp4,
    RotatedPlan,
    RotatedSolution,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
    reciprocal,
)
from svdq_cli.runtime.linear import RotatedLinear, W4A4Linear, quantized_linear
from svdq_cli.solve.forward import dequantized_weight
from svdq_cli.solve.rebuild import rebuilt_weight
from svdq_cli.solve.smoothing import invertible
from svdq_cli.source import open_source
from svdq_cli.source.single_file import has_original_names
from tests.formats.solutions import differing_fields, random_solution, same_bits

CORE = format_named("comfy-core")
GOLDEN = Path(__file__).parents[1] / "golden/comfy_core/kitchen.safetensors"
GOLDEN_NVFP4 = GOLDEN.with_name("nvfp4.safetensors")
LAYERS = {"k256": (24, 256), "k320": (16, 320), "k512": (8, 512)}
MARKERS = {
    "w4a4": {"format": "convrot_w4a4", "convrot_groupsize": 256},
    "w4a8": {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256},
    "w4a16": {"format": "awq_w4a16", "group_size": 64},
}

# ---------------------------------------------------------------------------------------------- golden vectors


def golden(layer: str, kind: str) -> tuple[LayerPlan, dict[str, Tensor], dict[str, Tensor]]:
    """A layer's plan, its stored tensors as comfy-kitchen made them, and what it computes with them."""
    rows, columns = LAYERS[layer]
    found = {
        key.partition("/")[2]: tensor for key, tensor in load_file(GOLDEN).items() if key.startswith(layer)
    }
    stored = {key.removeprefix(f"{kind}."): t for key, t in found.items() if key.startswith(f"{kind}.weight")}
    linear = Linear(layer, columns, rows, bias=False)
    plan = W4A16Plan(linear) if kind == "w4a16" else RotatedPlan.of(linear, 4 if kind == "w4a4" else 8)
    marker = dict(MARKERS[kind])
    if columns % 256:
        marker["convrot_groupsize"] = 64
    if kind == "w4a16":
        marker = MARKERS[kind]
    return plan, {**stored, "comfy_quant": text_bytes(json.dumps(marker))}, found


@pytest.mark.parametrize("kind", MARKERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_comfy_kitchen_made_is_read_and_written_again_bit_for_bit(layer: str, kind: str):
    plan, stored, _ = golden(layer, kind)
    again = CORE.encode(CORE.decode(plan, stored))
    assert again.keys() == stored.keys()
    assert [name for name in stored if not same_bits(stored[name], again[name])] == []


@pytest.mark.parametrize("kind", ["w4a4", "w4a8"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_rotated_weight_is_what_comfy_kitchen_dequantizes(layer: str, kind: str):
    plan, stored, found = golden(layer, kind)
    # a rotation adds up 256 numbers in float32
    torch.testing.assert_close(
        rebuilt_weight(CORE.decode(plan, stored)), found[f"{kind}.dequantized"], rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("kind", MARKERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_computes_what_comfy_kitchen_computes(layer: str, kind: str):
    """In float32, where neither rounds on the way."""
    plan, stored, found = golden(layer, kind)
    solution = CORE.decode(plan, stored)
    y = quantized_linear(solution)(found["x"]) + found["bias"]
    error = float((y - found[f"{kind}.y"]).norm() / found[f"{kind}.y"].norm())
    # W4A16 modules round their input and their weights to 16 bits; a rotated code that lies on an edge may flip
    assert error < (6e-3 if kind == "w4a16" else 1e-3)


def test_rounding_to_nearest_gives_the_bytes_of_comfy_kitchens_own_quantizer():
    from svdq_cli.runtime.naive import naive_rotated

    plan, stored, found = golden("k512", "w4a4")
    assert isinstance(plan, RotatedPlan)
    encoded = CORE.encode(naive_rotated(plan, found["weight"], None, torch.bfloat16))
    differing = encoded["weight"] != stored["weight"]
    assert int(differing.sum()) <= 2  # codes on an edge, where sums in another order fall to the other side
    torch.testing.assert_close(encoded["weight_scale"], stored["weight_scale"], rtol=1e-6, atol=0)


NVFP4_LAYERS = {"k256": (32, 256), "k320": (16, 320), "k128": (144, 128)}


def golden_nvfp4(layer: str) -> tuple[W4A4Plan, dict[str, Tensor], dict[str, Tensor]]:
    """As `golden`. Inputs were multiplied by `pre_quant_scale` and quantized with the scale of the whole tensor."""
    rows, columns = NVFP4_LAYERS[layer]
    found = {
        key.partition("/")[2]: t for key, t in load_file(GOLDEN_NVFP4).items() if key.startswith(f"{layer}/")
    }
    stored = {key.removeprefix("nvfp4."): t for key, t in found.items() if key.startswith("nvfp4.")}
    stored = {key: t for key, t in stored.items() if key.startswith(("weight", "pre_quant"))}
    marker = text_bytes(json.dumps({"format": "nvfp4"}))
    plan = W4A4Plan(Linear(layer, columns, rows, bias=False), NvFp4(), 0)
    return plan, {**stored, "comfy_quant": marker}, found


@pytest.mark.parametrize("layer", NVFP4_LAYERS)
def test_an_nvfp4_module_of_comfy_kitchen_is_read_and_written_again_bit_for_bit(layer: str):
    plan, stored, _ = golden_nvfp4(layer)
    again = CORE.encode(CORE.decode(plan, stored))
    assert again.keys() == stored.keys()
    marker = stored.pop("comfy_quant")
    said = json.loads(again["comfy_quant"].numpy().tobytes())
    assert {**json.loads(marker.numpy().tobytes()), "svdq_exponent": "+00"} == said
    assert [name for name in stored if not same_bits(stored[name], again[name])] == []


@pytest.mark.parametrize("layer", NVFP4_LAYERS)
def test_an_nvfp4_weight_is_what_comfy_kitchen_dequantizes(layer: str):
    plan, stored, found = golden_nvfp4(layer)
    solution = CORE.decode(plan, stored)
    assert isinstance(solution, W4A4Solution)
    assert torch.equal(dequantized_weight(solution), found["nvfp4.dequantized"])
    assert torch.equal(1 / solution.smooth.float(), stored["pre_quant_scale"].float())


@pytest.mark.parametrize("layer", NVFP4_LAYERS)
def test_an_nvfp4_layer_computes_what_comfy_kitchen_computes_but_for_the_scales_of_activations(layer: str):
    """The same operands in another order: x / smooth, the codes of the weight, one outer scale. What differs is how a
    row's groups get their scales: by themselves here, relative to the tensor's largest number there."""
    plan, stored, found = golden_nvfp4(layer)
    solution = CORE.decode(plan, stored)
    assert isinstance(solution, W4A4Solution)
    y = found["nvfp4.x_dequantized"] @ dequantized_weight(solution).T + found["bias"]
    torch.testing.assert_close(y, found["nvfp4.y"], rtol=1e-5, atol=1e-4)
    own = quantized_linear(solution)(found["x"]) + found["bias"]
    exact = (found["x"] * stored["pre_quant_scale"].float()) @ found["weight"].T + found["bias"]
    noise = float((found["nvfp4.y"] - exact).norm())
    # two quantizations of one input, each about as far from it as from the other
    assert 0.5 * noise < float((own - exact).norm()) < 1.5 * noise


# ---------------------------------------------------------------------------------------------- single modules

PLANS: dict[str, LayerPlan] = {
    "w4a4": RotatedPlan.of(Linear("a", 320, 24, bias=True)),
    "w4a8": RotatedPlan.of(Linear("a", 512, 24, bias=True), 8),
    "w4a16": W4A16Plan(Linear("a", 128, 24, bias=True)),
    "nvfp4": W4A4Plan(Linear("a", 320, 144, bias=True), NvFp4(), 0),
    "nvfp4 without a bias": W4A4Plan(Linear("a", 192, 48, bias=False), NvFp4(), 0),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_encoded_is_decoded_bit_for_bit_and_as_the_specs_say(plan: LayerPlan, dtype: torch.dtype):
    solution = random_solution(plan, dtype=dtype)
    stored = CORE.encode(solution)
    specs = CORE.tensor_specs(plan, dtype)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    assert differing_fields(CORE.decode(plan, stored), solution) == []


def test_a_smoothing_factor_whose_inverse_does_not_give_it_back_is_refused():
    solution = random_solution(PLANS["nvfp4"])
    assert isinstance(solution, W4A4Solution)
    solution.smooth[0] = 1.9765625  # 1 / it, in bfloat16, is also that of 1.96875
    with pytest.raises(ValueError, match="1 / smooth is not exact in 16 bits"):
        CORE.encode(solution)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smoothing_factors_are_moved_to_where_their_inverse_gives_them_back(dtype: torch.dtype):
    sizes = torch.exp2(torch.linspace(-13, 13, 5001))
    moved = invertible(sizes, dtype)
    assert torch.equal(reciprocal(reciprocal(moved)), moved)
    assert same_bits(invertible(moved.float(), dtype), moved)
    assert float((moved.float() / sizes - 1).abs().max()) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("exponent", [-9, 0, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nvfp4_inputs_are_scaled_around_one_so_that_comfyui_adds_loras_at_their_strength(
    dtype: torch.dtype, exponent: int
):
    """ComfyUI adds a LoRA to the weight that multiplies scaled inputs. What svdq scales all of them by is in the
    marker, and comes back bit for bit."""
    solution = random_solution(PLANS["nvfp4"], dtype=dtype)
    assert isinstance(solution, W4A4Solution)
    assert solution.outer is not None
    center = round(float(-solution.smooth.float().log2().mean()))
    solution.smooth.mul_(2.0 ** (center - exponent))
    stored = CORE.encode(solution)
    assert abs(float(stored["pre_quant_scale"].float().log2().mean())) <= 0.5
    product = stored["pre_quant_scale"].float() * stored["weight_scale_2"] * solution.smooth.float()
    torch.testing.assert_close(product, solution.outer.float().expand_as(product), rtol=1e-2, atol=0)
    assert differing_fields(CORE.decode(PLANS["nvfp4"], stored), solution) == []


@pytest.mark.parametrize("said", ["", "6", "+6", "+1000", "nan"])
def test_an_exponent_that_svdq_does_not_write_is_refused(said: str):
    stored = CORE.encode(random_solution(PLANS["nvfp4"]))
    stored["comfy_quant"] = text_bytes(json.dumps({"format": "nvfp4", "svdq_exponent": said}))
    with pytest.raises(InputError, match="comfy_quant says"):
        CORE.decode(PLANS["nvfp4"], stored)


def test_an_outer_scale_for_each_row_is_refused():
    solution = random_solution(PLANS["nvfp4"], outer_per_row=True)
    with pytest.raises(ValueError, match="stores one outer scale for a module"):
        CORE.encode(solution)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "weight_scale",
            lambda t: t.view(torch.uint8)[-1].fill_(1),
            "padding of the micro scales is not zero",
        ),
        ("weight_scale_2", lambda t: t.fill_(0.1), "weight_scale_2 is not exact"),
        ("pre_quant_scale", lambda t: t[0].fill_(1.9765625), "pre_quant_scale is not 1 / smooth"),
        ("pre_quant_scale", lambda t: t[0].fill_(0), "pre_quant_scale is not 1 / smooth"),
    ],
)
def test_nvfp4_numbers_that_no_svdq_file_holds_are_refused(
    name: str, change: Callable[[Tensor], object], message: str
):
    stored = CORE.encode(random_solution(PLANS["nvfp4"]))
    change(stored[name])
    with pytest.raises(InputError, match=message):
        CORE.decode(PLANS["nvfp4"], stored)


def test_a_zero_that_the_middle_code_cannot_hold_is_refused():
    solution = random_solution(PLANS["w4a16"])
    assert isinstance(solution, W4A16Solution)
    solution.zeros[0, 0] = 1 + 2**-7  # next to scales of 0.02, 8 codes further down takes more than 8 bits
    with pytest.raises(ValueError, match="not exact in 16 bits"):
        CORE.encode(solution)


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (Linear("a", 96, 24, bias=True), "in_features 96 is not a multiple of 64"),
        (
            Linear("a", 128, 24, True, "conv1x1"),
            "it is a 1x1 convolution, and ComfyUI reads linear layers only",
        ),
    ],
)
def test_what_comfyui_cannot_run_is_refused_with_the_reason(linear: Linear, reason: str):
    assert CORE.unsupported_reason(RotatedPlan.of(linear)) == reason


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (W4A4Plan(Linear("a", 128, 24, True), NvFp4(), 0), "out_features 24 is not a multiple of 16"),
        (W4A4Plan(Linear("a", 128, 32, True), NvFp4(), 16), "comfy-core has no low-rank branch"),
        (W4A4Plan(Linear("a", 128, 32, True), Int4(), 0), "comfy-core has no low-rank branch"),
    ],
)
def test_w4a4_modules_that_comfyui_cannot_run_are_refused_with_the_reason(plan: W4A4Plan, reason: str):
    assert CORE.unsupported_reason(plan) == reason


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": "svdquant_w4a4"}, "comfy_quant says"),
        ({"format": "convrot_w4a4", "convrot_groupsize": 16}, "comfy_quant says"),
        (None, "comfy_quant is missing or not a JSON object"),
    ],
)
def test_a_module_whose_metadata_says_something_else_is_refused(said: object, message: str):
    plan = PLANS["w4a4"]
    stored = CORE.encode(random_solution(plan))
    if said is None:
        del stored["comfy_quant"]
    else:
        stored["comfy_quant"] = text_bytes(json.dumps(said))
    with pytest.raises(InputError, match=message):
        CORE.decode(plan, stored)


# ---------------------------------------------------------------------------------------------- whole files

FAMILIES = ("flux", "flux2", "chroma", "qwen-image", "z-image", "wan", "sd3", "sdxl", "pixart")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory, tiny_flux: Path) -> Callable[[str], Path]:
    """By family, its tiny pipeline."""
    from tests.tiny_families import tiny_pipeline

    made: dict[str, Path] = {"flux": tiny_flux}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tiny_pipeline(family, tmp_path_factory.mktemp(family) / family)
        return made[family]

    return of


@pytest.fixture(scope="module")
def converted(
    model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """By family and precision, a data-free conversion to comfy-core."""
    made: dict[tuple[str, str], Path] = {}

    def of(family: str, precision: Literal["int4", "nvfp4"] = "int4") -> Path:
        if (family, precision) not in made:
            made[family, precision] = tmp_path_factory.mktemp("out") / f"{family}.safetensors"
            recipe = default_recipe(
                str(model_of(family)),
                quantization=Quantization(effort="datafree", precision=precision),
                outputs=(Output(format="comfy-core"),),
            )
            convert(recipe, made[family, precision], options=RunOptions(device="cpu"))
        return made[family, precision]

    return of


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_under_the_names_of_its_original_and_checks(
    converted, model_of, family: str, precision: str
):
    file = converted(family, precision)
    checkpoint, source = open_checkpoint(file), open_source(model_of(family))
    report = check(file, against=source)
    assert report.problems == ()
    assert report.format == "comfy-core"
    assert checkpoint.precision is not None
    assert (checkpoint.precision.name, checkpoint.rank) == (precision, None)
    kind = RotatedPlan if precision == "int4" else W4A4Plan
    assert any(isinstance(layer, kind) for layer in checkpoint.layers)
    stored = [layer.name for module in checkpoint.file.modules for layer in module.layers]
    assert sorted(stored) == sorted(layer.name for layer in checkpoint.layers)  # each once
    if family != "qwen-image":  # whose original names are diffusers'
        assert has_original_names(checkpoint.source.tensors)


@pytest.mark.parametrize("family", ["flux", "z-image", "sdxl"])
def test_what_stays_at_16_bits_comes_back_under_its_own_name(converted, model_of, family: str):
    from svdq_cli.source import read_tensor

    checkpoint, source = open_checkpoint(converted(family)), open_source(model_of(family))
    quantized = {f"{layer.name}.{kind}" for layer in checkpoint.layers for kind in ("weight", "bias")}
    assert set(checkpoint.kept_names()) == source.tensors.keys() - quantized
    for name in checkpoint.kept_names():
        assert same_bits(checkpoint.kept_tensor(name), read_tensor(source, name).to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("flux", {"double_blocks.0.img_attn.qkv": "convrot_w4a4", "single_blocks.0.linear1": "convrot_w4a4"}),
        ("flux", {"double_blocks.0.img_mod.lin": "awq_w4a16", "single_blocks.0.modulation.lin": "awq_w4a16"}),
        (
            "qwen-image",
            {"transformer_blocks.0.attn.to_q": "convrot_w4a4", "transformer_blocks.0.img_mod.1": "awq_w4a16"},
        ),
        ("z-image", {"layers.0.attention.qkv": "convrot_w4a4", "layers.0.feed_forward.w2": "convrot_w4a4"}),
        ("wan", {"blocks.0.self_attn.q": "convrot_w4a4", "blocks.0.ffn.2": "convrot_w4a4"}),
    ],
)
@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_modules_carry_the_metadata_by_which_comfyui_chooses_their_layout(
    converted, family: str, modules, precision: str
):
    with safe_open(converted(family, precision), framework="pt") as file:
        for name, algorithm in modules.items():
            said = json.loads(file.get_tensor(f"{name}.comfy_quant").numpy().tobytes())
            assert said["format"] == algorithm.replace(
                "convrot_w4a4", precision.replace("int4", "convrot_w4a4")
            )
            if said["format"] == "nvfp4":
                assert said.keys() == {"format", "svdq_exponent"}
                assert file.get_tensor(f"{name}.pre_quant_scale").dtype == torch.bfloat16


def test_sdxl_keeps_the_text_projections_whose_shape_tells_comfyui_the_model(converted):
    """ComfyUI reads the text width off `attn2.to_k`, whose packed weight would have half of it."""
    with safe_open(converted("sdxl"), framework="pt") as file:
        names = [name for name in file.keys() if name.endswith("attn2.to_k.weight")]  # noqa: SIM118  no iterator
        assert names
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in names)


def test_layers_that_are_one_nvfp4_matrix_have_one_outer_scale_and_one_smoothing_factor(
    demo_calibration: Path, tmp_path: Path
):
    file = tmp_path / "nvfp4.safetensors"
    recipe = default_recipe(
        "demo",
        quantization=Quantization(effort="balanced", precision="nvfp4"),
        outputs=(Output(format="comfy-core"),),
    )
    report = convert(recipe, file, calibration=demo_calibration, options=RunOptions(device="cpu"))
    assert check(file).problems == ()
    checkpoint = open_checkpoint(file)
    module = next(m for m in checkpoint.file.modules if m.name == "single_blocks.0.linear1")
    assert [layer.name.rpartition(".")[2] for layer in module.layers] == ["to_q", "to_k", "to_v", "proj_mlp"]
    first, *others = (checkpoint.solution(layer) for layer in module.layers)
    assert isinstance(first, W4A4Solution)
    assert bool((first.smooth != 1).any())  # it was searched
    for other in others:
        assert isinstance(other, W4A4Solution)
        assert same_bits(other.smooth, first.smooth)
        assert same_bits(other.outer, first.outer)
    searched = report.search.layers["single_transformer_blocks.0.attn.to_q"]
    assert {"learned", "gptq"} <= set(searched.steps_db)
    assert "refit" not in searched.steps_db  # there is no branch to refit


def test_an_nvfp4_file_generates_in_plain_torch(converted, tiny_flux: Path):
    pipe = load_pipeline(converted("flux", "nvfp4"), base=tiny_flux, device="cpu", backend="reference")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert isinstance(layer, W4A4Linear)
    assert layer.branch.down.shape == (0, 128)
    assert torch.isfinite(layer(torch.randn(3, 128))).all()


def test_a_file_generates_in_plain_torch(converted, tiny_flux: Path):
    pipe = load_pipeline(converted("flux"), base=tiny_flux, device="cpu", backend="auto")
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_q, RotatedLinear)
    assert torch.isfinite(pipe.transformer.transformer_blocks[0].attn.to_q(torch.randn(3, 128))).all()


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_file_that_lost_its_header_is_still_recognized(
    converted, tiny_flux: Path, tmp_path: Path, precision: str
):
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(converted("flux", precision)), bare)
    checkpoint = open_checkpoint(bare, base=tiny_flux)
    assert checkpoint.format.name == "comfy-core"
    assert checkpoint.precision is not None
    assert checkpoint.precision.name == precision


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_changed_code_is_found_without_the_source(
    converted, tmp_path: Path, tiny_flux: Path, precision: str
):
    file = converted("flux", precision)
    tensors = load_file(file)
    weight = tensors["double_blocks.0.img_mlp.0.weight"]
    tensors["double_blocks.0.img_mlp.0.weight"] = weight.roll(5, 0)
    with safe_open(file, framework="pt") as opened:
        save_file(tensors, tmp_path / "rolled.safetensors", opened.metadata())
    report = check(tmp_path / "rolled.safetensors", against=open_source(tiny_flux))
    assert [problem.layer for problem in report.problems] == ["transformer_blocks.0.ff.net.0.proj"]


def test_formats_with_and_without_a_branch_are_not_one_conversion(tiny_flux: Path, tmp_path: Path):
    recipe = default_recipe(
        str(tiny_flux),
        quantization=Quantization(effort="datafree"),
        outputs=(Output(format="nunchaku-lite"), Output(format="comfy-core")),
    )
    with pytest.raises(UsageError, match="comfy-core rotates inputs") as refused:
        convert(recipe, (tmp_path / "a", tmp_path / "b.safetensors"), options=RunOptions(device="cpu"))
    assert refused.value.hint is not None
    assert "--calib" in refused.value.hint


@pytest.mark.parametrize(
    ("precision", "cure"),
    [("int4", "gives layers 8-bit activations"), ("nvfp4", "leaves layers at 16 bits")],
)
def test_a_plan_says_that_there_is_no_branch_and_what_helps(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, cure: str
):
    from svdq_cli.cli import run

    out = tmp_path / "out.safetensors"
    command = f"convert {tiny_flux} --format comfy-core --precision {precision} --effort datafree -o {out}"
    command += " --plan --json"
    assert run(command.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["layers"] == {"w4a4": 17, "w4a16": 3, "kept": 8, "w4a8": 0}
    (warning,) = (text for text in said["warnings"] if "no low-rank branch" in text)
    assert f"a size_budget {cure}" in warning


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_file_without_a_branch_is_not_exported_into_a_format_that_needs_one(
    converted, tmp_path: Path, precision: str
):
    from svdq_cli.entrypoints.export import export

    with pytest.raises(UsageError, match="no low-rank branch, so nothing can be exported"):
        export(converted("flux", precision), "nunchaku-lite", tmp_path / "out")


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_a_lora_is_not_folded_into_a_file_without_a_branch(converted, tmp_path: Path, precision: str):
    from svdq_cli.lora.fold import fold

    with pytest.raises(UsageError, match="no low-rank branch to fold a LoRA into") as refused:
        fold(
            converted("flux", precision),
            (LoraFile(tmp_path / "lora.safetensors", 1.0),),
            tmp_path / "out.safetensors",
        )
    assert refused.value.hint == "merge it when converting: svdq convert SOURCE --lora FILE"


def test_nvfp4_is_not_one_conversion_with_a_branch_either(tiny_flux: Path, tmp_path: Path):
    recipe = default_recipe(
        str(tiny_flux),
        quantization=Quantization(effort="datafree", precision="nvfp4"),
        outputs=(Output(format="nunchaku-lite"), Output(format="comfy-core")),
    )
    with pytest.raises(UsageError, match="comfy-core has no low-rank branch, so its layers are solved"):
        convert(recipe, (tmp_path / "a", tmp_path / "b.safetensors"), options=RunOptions(device="cpu"))


@pytest.mark.parametrize(
    ("precision", "title", "tag"),
    [("int4", "ConvRot int4 for ComfyUI", "convrot"), ("nvfp4", "nvfp4 for ComfyUI", "smoothquant")],
)
def test_the_card_says_how_inputs_were_treated(converted, precision: str, title: str, tag: str):
    card = Path(f"{converted('flux', precision)}.README.md").read_text()
    assert f", {title}\n" in card
    assert f"- {tag}\n" in card
    assert ("Inputs are rotated" in card) == (precision == "int4")
    assert ("Inputs are not smoothed" in card) == (precision == "nvfp4")  # without calibration


@pytest.fixture(scope="module")
def demo_calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from svdq_cli.cli import run

    folder = tmp_path_factory.mktemp("calibration") / "demo"
    assert run(f"calibrate demo --samples 4 --steps 2 --batch-size 4 -o {folder}".split()) == 0
    return folder


def test_effort_best_has_no_branches_to_tune_and_says_so(demo_calibration: Path, tmp_path: Path):
    recipe = default_recipe(
        "demo", quantization=Quantization(effort="best"), outputs=(Output(format="comfy-core"),)
    )
    options = RunOptions(device="cpu")
    report = convert(recipe, tmp_path / "out.safetensors", calibration=demo_calibration, options=options)
    assert any("effort best does what balanced does" in warning for warning in report.warnings)


def test_a_size_budget_gives_some_layers_8_bit_activations(demo_calibration: Path, tmp_path: Path):
    """All layers of one input together, for they may be one matrix in the file."""

    def made(budget: int | None) -> tuple[int, dict[str, int]]:
        file = tmp_path / f"{budget}.safetensors"
        quantization = Quantization(effort="fast", size_budget=budget)
        recipe = default_recipe("demo", quantization=quantization, outputs=(Output(format="comfy-core"),))
        convert(recipe, file, calibration=demo_calibration, options=RunOptions(device="cpu"))
        layers = [layer for layer in open_checkpoint(file).layers if isinstance(layer, RotatedPlan)]
        return file.stat().st_size, {layer.name: layer.activation_bits for layer in layers}

    least, plain = made(None)
    size, mixed = made(least * 51 // 50)
    assert set(plain.values()) == {4}
    assert set(mixed.values()) == {4, 8}
    assert least < size <= least * 51 // 50
    for block in range(2):
        head = f"transformer_blocks.{block}.attn"
        assert len({mixed[f"{head}.{name}"] for name in ("to_q", "to_k", "to_v")}) == 1


def test_a_size_budget_leaves_nvfp4_layers_at_16_bits(demo_calibration: Path, tmp_path: Path):
    """All layers of one input together, for they may be one matrix in the file."""
    sizes: list[tuple[int, int]] = []
    for budget in (None, 6_000_000):
        file = tmp_path / f"{budget}.safetensors"
        quantization = Quantization(effort="fast", precision="nvfp4", rank="auto", size_budget=budget)
        recipe = default_recipe("demo", quantization=quantization, outputs=(Output(format="comfy-core"),))
        convert(recipe, file, calibration=demo_calibration, options=RunOptions(device="cpu"))
        layers = open_checkpoint(file).by_name
        sizes.append((file.stat().st_size, len(layers)))
        for block in range(2):
            head = f"transformer_blocks.{block}.attn"
            assert len({f"{head}.{name}" in layers for name in ("to_q", "to_k", "to_v")}) == 1
    (least, every), (size, fewer) = sizes
    assert fewer < every
    assert least < size <= 6_000_000


def test_solutions_of_layers_that_share_an_input_are_stored_as_one_matrix(converted):
    checkpoint = open_checkpoint(converted("flux"))
    module = next(module for module in checkpoint.file.modules if module.name == "single_blocks.0.linear1")
    assert [layer.name.rpartition(".")[2] for layer in module.layers] == ["to_q", "to_k", "to_v", "proj_mlp"]
    assert all(isinstance(checkpoint.solution(layer), RotatedSolution) for layer in module.layers)


def test_users_read_from_which_comfyui_on_modulations_in_four_bits_load(
    converted, capsys: pytest.CaptureFixture[str]
):
    """On the screen of a conversion and of `svdq inspect`, and on the card; SDXL has no modulations."""
    from svdq_cli.cli import run

    for family, there in (("flux", True), ("sdxl", False)):
        file = converted(family)
        assert run(["inspect", str(file)]) == 0
        assert ("ComfyUI loads them from 0.38.1 on" in " ".join(capsys.readouterr().out.split())) is there
        card = " ".join(file.with_name(f"{file.name}.README.md").read_text().split())
        assert ("In ComfyUI 0.38.1 and later" in card) is there
        assert ("Load LoRA (Bypass)" in card) is there
        assert ("In ComfyUI 0.33 and later" in card) is not there
