"""Classic Nunchaku files: the bytes, the key lists of the runtime, and the way back to the model's layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from svdq_cli.checkpoint.match_layout import known_layout, lay_out
from svdq_cli.checkpoint.writer import target_of
from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats import format_named
from svdq_cli.formats.contract import LayoutTraits
from svdq_cli.records import GELU_SHIFT, Int4, Linear, NvFp4, Precision, W4A4Plan, W4A4Solution
from tests.formats.solutions import random_solution, same_bits, w4a4_plan
from tests.full_size import FLUX_DEV, full_size_plan

GOLDEN = Path(__file__).parents[1] / "golden"
NUNCHAKU = format_named("nunchaku")
ENGINE = LayoutTraits(engine_names=True)

# ---------------------------------------------------------------------------------------------- against golden bytes


def golden_solution(name: str) -> tuple[W4A4Solution, dict[str, torch.Tensor]]:
    """The layer that a golden file holds before and after the reference's own conversion."""
    file = load_file(GOLDEN / f"{name}.safetensors")
    precision: Precision = NvFp4() if "nvfp4" in name else Int4()
    rows, columns = file["in.weight"].shape
    plan = W4A4Plan(Linear("layer", columns, rows, True), precision, len(file["in.lora_a"]))
    outer = file.get("ref.outer_scale")
    solution = W4A4Solution(
        plan=plan,
        smooth=file["in.smooth"],
        down=file["stored.lora_down"],
        up=file["in.lora_b"],
        codes=file["ref.codes"],
        scales=file["ref.scales"],
        outer=None if outer is None else outer.flatten(),
        bias=file["stored.bias"],
    )
    return solution, {key.removeprefix("dc."): t for key, t in file.items() if key.startswith("dc.")}


@pytest.mark.parametrize(
    ("name", "row_scales"),
    [
        ("e2e_int4_plain_128x128_r16", False),
        ("e2e_int4_shift_128x128_r16", False),
        ("e2e_nvfp4_tensor_128x128_r16", False),
        ("e2e_nvfp4_channel_384x128_r16", True),
    ],
)
def test_a_module_has_the_bytes_of_the_reference_exporter(name: str, row_scales: bool):
    solution, stored = golden_solution(name)
    traits = LayoutTraits(row_scales=row_scales, engine_names=True)
    encoded = NUNCHAKU.encode(solution, traits)
    assert encoded.keys() == stored.keys()
    assert [key for key in stored if not same_bits(encoded[key], stored[key])] == []
    decoded = NUNCHAKU.decode(solution.plan, stored, traits)
    assert isinstance(decoded, W4A4Solution)
    for field in ("smooth", "down", "up", "codes", "scales", "outer", "bias"):
        assert same_bits(getattr(decoded, field), getattr(solution, field)), field


def test_the_folded_shift_is_closer_to_the_float_layer_than_the_reference_exporters():
    """We fold the shift with the codes that are stored, the reference with the float weight: what rounding left over in
    each row then stays in its output."""
    from svdq_cli.checkpoint.assembly import join_layers
    from svdq_cli.families.layouts.layout import BlockLayout, ModelLayout, renamed

    solution, _ = golden_solution("e2e_int4_shift_128x128_r16")
    file = load_file(GOLDEN / "e2e_int4_shift_128x128_r16.safetensors")
    plan = W4A4Plan(Linear("blocks.0.ff", 128, 128, True), Int4(), 16)
    layout = ModelLayout(
        "any", "nunchaku", (BlockLayout("blocks", "blocks", (renamed("fc2", "ff", after_gelu=True),)),)
    )
    (module,) = lay_out(NUNCHAKU, layout, (plan,), {"blocks.0.ff.weight": (128, 128)}).modules
    assert module.traits.unsigned
    unshifted = W4A4Solution(
        plan,
        solution.smooth,
        solution.down,
        solution.up,
        solution.codes,
        solution.scales,
        None,
        file["in.bias"],
    )
    ours = join_layers(module, {"blocks.0.ff": unshifted}).bias
    assert ours is not None

    groups = file["run.act_codes"].double().unflatten(1, (-1, 64)) * file[
        "run.act_scales"
    ].double().unsqueeze(-1)
    weight = (
        solution.codes.double().unflatten(1, (-1, 64)) * solution.scales.double().unsqueeze(-1)
    ).flatten(1)
    branch = file["x"].double() @ solution.down.double().T @ solution.up.double().T
    without_bias = groups.flatten(1) @ weight.T + branch
    exact = file["y_unquantised_f32"].double()

    def error(bias: torch.Tensor) -> float:
        return float((without_bias + bias.double() - exact).norm() / exact.norm())

    assert torch.allclose(without_bias + file["stored.bias"].double(), file["y_f32"].double(), atol=1e-4)
    assert error(ours) < error(file["stored.bias"])
    assert error(file["in.bias"]) > 2 * error(ours)  # not folding it at all is a fault, not a choice


# ---------------------------------------------------------------------------------------------- FLUX.1-dev, full size

DOUBLE = {
    **dict.fromkeys(
        ("qkv_proj", "qkv_proj_context", "out_proj", "out_proj_context", "mlp_fc1", "mlp_fc2"), "w4a4"
    ),
    **dict.fromkeys(("mlp_context_fc1", "mlp_context_fc2"), "w4a4"),
    **dict.fromkeys(("norm1.linear", "norm1_context.linear"), "w4a16"),
    **dict.fromkeys(("norm_q", "norm_k", "norm_added_q", "norm_added_k"), "norm"),
}
SINGLE = {
    **dict.fromkeys(("qkv_proj", "out_proj", "mlp_fc1", "mlp_fc2"), "w4a4"),
    "norm.linear": "w4a16",
    **dict.fromkeys(("norm_q", "norm_k"), "norm"),
}
SUFFIXES = {
    "w4a4": ("qweight", "wscales", "bias", "smooth", "smooth_orig", "lora_down", "lora_up"),
    "w4a16": ("qweight", "wscales", "wzeros", "bias"),
    "norm": ("weight",),
}
TOP = (
    "context_embedder",
    "norm_out.linear",
    "proj_out",
    "time_text_embed.guidance_embedder.linear_1",
    "time_text_embed.guidance_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
    "time_text_embed.text_embedder.linear_2",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
    "x_embedder",
)


def flux_dev_keys(precision: Precision) -> set[str]:
    """The key list of the runtime's own FLUX.1-dev file."""
    keys = {f"{name}.{kind}" for name in TOP for kind in ("weight", "bias")}
    for stack, count, modules in (
        ("transformer_blocks", 19, DOUBLE),
        ("single_transformer_blocks", 38, SINGLE),
    ):
        for block in range(count):
            for module, kind in modules.items():
                keys |= {f"{stack}.{block}.{module}.{suffix}" for suffix in SUFFIXES[kind]}
                if kind == "w4a4" and isinstance(precision, NvFp4):
                    outer = "wcscales" if module.startswith("qkv") else "wtscale"
                    keys.add(f"{stack}.{block}.{module}.{outer}")
    return keys


@pytest.mark.parametrize(("precision", "count"), [(Int4(), 2604), (NvFp4(), 2908)])
def test_the_key_list_of_flux1_dev_at_full_size(tmp_path: Path, precision: Precision, count: int):
    plan, inventory = full_size_plan(tmp_path, FLUX_DEV, NUNCHAKU, precision)
    assert len(inventory.state) == 1160
    target = target_of(NUNCHAKU, plan, inventory.state, torch.bfloat16)
    keys = {
        f"{module.name}.{suffix}"
        for module in target.file.modules
        for suffix in NUNCHAKU.tensor_specs(module.plan, torch.bfloat16, module.traits)
    } | target.file.kept.keys()
    assert len(keys) == count
    assert keys == flux_dev_keys(precision)


def test_the_single_blocks_output_is_cut_where_the_attention_ends(tmp_path: Path):
    plan, inventory = full_size_plan(tmp_path, FLUX_DEV, NUNCHAKU, Int4())
    file = lay_out(NUNCHAKU, known_layout(NUNCHAKU, "flux", plan.model_class), plan.layers, inventory.state)
    attention, mlp = file.parts_of("single_transformer_blocks.5.proj_out")
    assert (attention.columns, mlp.columns) == ((0, 3072), (3072, 15360))
    assert (attention.traits.unsigned, mlp.traits.unsigned) == (False, True)
    assert (attention.plan.linear.bias, attention.carries_bias, mlp.carries_bias) == (True, False, True)


# ---------------------------------------------------------------------------------------------- one module


@pytest.mark.parametrize("precision", [Int4(), NvFp4()])
@pytest.mark.parametrize("engine", [False, True])
def test_a_module_comes_back_bit_for_bit(precision: Precision, engine: bool):
    for row_scales in (False, True):
        plan = w4a4_plan(precision=precision, rows=256, columns=128, rank=32)
        solution = random_solution(plan, outer_per_row=row_scales)
        traits = LayoutTraits(row_scales=row_scales, engine_names=engine)
        stored = NUNCHAKU.encode(solution, traits)
        specs = NUNCHAKU.tensor_specs(plan, torch.bfloat16, traits)
        assert {key: (tuple(t.shape), t.dtype) for key, t in stored.items()} == {
            key: (spec.shape, spec.dtype) for key, spec in specs.items()
        }
        back = NUNCHAKU.decode(plan, stored, traits)
        for field in ("smooth", "down", "up", "codes", "scales", "outer", "bias"):
            assert same_bits(getattr(back, field), getattr(solution, field)), field


def test_another_spelling_is_refused_by_tensor_name():
    plan = w4a4_plan(precision=Int4())
    stored = NUNCHAKU.encode(random_solution(plan))
    with pytest.raises(InputError, match="lora_down is missing"):
        NUNCHAKU.decode(plan, stored, ENGINE)


def test_the_shift_is_exact_in_bfloat16():
    assert torch.tensor(GELU_SHIFT).to(torch.bfloat16).item() == GELU_SHIFT


# ---------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_lite_and_classic_of_one_conversion_hold_the_same_layers(converted_flux, precision: str):
    from svdq_cli.checkpoint.reader import open_checkpoint
    from tests.formats.solutions import differing_fields

    lite = open_checkpoint(converted_flux(precision) / "lite")
    classic = open_checkpoint(converted_flux(precision) / "nunchaku.safetensors")
    assert set(lite.layers) == set(classic.layers)
    assert (classic.format.name, classic.family, classic.rank) == ("nunchaku", "flux", 16)
    wrong = {
        layer.name: found
        for layer in lite.layers
        if (found := differing_fields(lite.solution(layer), classic.solution(layer)))
    }
    assert wrong == {}
    assert set(lite.kept_names()) == set(classic.kept_names())
    assert all(same_bits(lite.kept_tensor(name), classic.kept_tensor(name)) for name in lite.kept_names())


def test_the_header_says_what_the_runtimes_build_the_model_from(converted_flux):
    with safe_open(converted_flux("nvfp4") / "nunchaku.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["model_class"] == "NunchakuFluxTransformer2dModel"
    assert json.loads(header["config"])["num_single_layers"] == 1
    assert json.loads(header["quantization_config"]) == {
        "method": "svdquant",
        "weight": {"dtype": "fp4_e2m1_all", "scale_dtype": [None, "fp8_e4m3_nan"], "group_size": 16},
        "activation": {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16},
        "rank": 16,
    }
    comfy = json.loads(header["comfy_config"])
    assert comfy["model_class"] == "Flux"
    assert comfy["model_config"]["hidden_size"] == 128
    assert comfy["model_config"]["guidance_embed"] is False


def test_the_modulation_is_interleaved_with_one_added_to_its_scales(converted_flux):
    """Row 6 c + j of the stored bias is row c of vector j; vectors 1 and 4 are scales."""
    from svdq_cli.checkpoint.reader import open_checkpoint

    path = converted_flux("int4") / "nunchaku.safetensors"
    stored = load_file(path)["transformer_blocks.0.norm1.linear.bias"]
    checkpoint = open_checkpoint(path)
    plan = next(layer for layer in checkpoint.layers if layer.name == "transformer_blocks.0.norm1.linear")
    bias = checkpoint.solution(plan).bias
    assert bias is not None
    for part in range(6):
        added = 1 if part in (1, 4) else 0
        expected = (bias[part * 128 : (part + 1) * 128].double() + added).to(torch.bfloat16)
        assert same_bits(stored[part::6], expected)


def test_a_bias_changed_after_the_conversion_contradicts_the_header(converted_flux, tmp_path: Path):
    from safetensors.torch import save_file

    from svdq_cli.checkpoint.reader import open_checkpoint

    path = converted_flux("int4") / "nunchaku.safetensors"
    tensors = load_file(path)
    name = "transformer_blocks.0.mlp_fc2"
    tensors[f"{name}.bias"], tensors["transformer_blocks.0.mlp_context_fc2.bias"] = (
        tensors["transformer_blocks.0.mlp_context_fc2.bias"],
        tensors[f"{name}.bias"],
    )
    with safe_open(path, framework="pt") as file:
        save_file(tensors, tmp_path / "swapped.safetensors", metadata=file.metadata())
    checkpoint = open_checkpoint(tmp_path / "swapped.safetensors")
    plan = next(layer for layer in checkpoint.layers if layer.name == "transformer_blocks.0.ff.net.2")
    with pytest.raises(InputError, match=r"transformer_blocks\.0\.mlp_fc2: bias does not match the one"):
        checkpoint.solution(plan)


def test_without_the_headers_record_the_bias_comes_back_to_one_rounding(converted_flux, tmp_path: Path):
    """A file of another tool: the shift is taken out of the bias again."""
    from safetensors.torch import save_file

    from svdq_cli.checkpoint.reader import open_checkpoint

    path = converted_flux("int4") / "nunchaku.safetensors"
    with safe_open(path, framework="pt") as file:
        header = {key: text for key, text in file.metadata().items() if not key.startswith("svdq")}
    save_file(load_file(path), tmp_path / "foreign.safetensors", metadata=header)
    ours, foreign = open_checkpoint(path), open_checkpoint(tmp_path / "foreign.safetensors")
    assert foreign.provenance is None
    for name in ("transformer_blocks.0.ff.net.2", "transformer_blocks.0.norm1.linear"):
        a, b = (next(layer for layer in c.layers if layer.name == name) for c in (ours, foreign))
        exact, near = ours.solution(a).bias, foreign.solution(b).bias
        assert exact is not None
        assert near is not None
        # bfloat16 keeps 8 bits of a sum that is at most 2 or so
        assert float((exact.float() - near.float()).abs().max()) < 2**-7


def test_a_layer_that_stays_at_16_bits_is_refused_by_name(tiny_flux: Path, tmp_path: Path):
    from svdq_cli.conversion.convert import convert
    from svdq_cli.prepare.options import RunOptions
    from svdq_cli.recipe import KeepOverride, Output, Quantization, default_recipe

    quantization = Quantization.model_validate({"rank": 16, "effort": "datafree"})
    recipe = default_recipe(
        str(tiny_flux), quantization=quantization, outputs=[Output(format="nunchaku", path="x")]
    ).model_copy(update={"layers": (KeepOverride(match="transformer_blocks.0.attn.to_k", keep=True),)})
    with pytest.raises(UsageError, match=r"stores transformer_blocks\.0\.qkv_proj in 4 bits"):
        convert(recipe, tmp_path / "x.safetensors", options=RunOptions(device="cpu"))
