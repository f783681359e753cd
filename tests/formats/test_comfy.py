"""ComfyUI files: the bytes of comfy-quants' own writer, and what comfy-kitchen's op makes of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats import format_named
from svdq_cli.formats.contract import LayoutTraits
from svdq_cli.records import (
    GELU_SHIFT,
    Int4,
    LayerPlan,
    Linear,
    NvFp4,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.runtime.linear import w4a4_exact, w4a16_weight
from tests.formats.solutions import differing_fields, random_solution, same_bits, w4a4_plan, w4a16_plan

GOLDEN = Path(__file__).parents[1] / "golden" / "comfy"
COMFY = format_named("comfy")
FILES = sorted(path.name.removesuffix(".plain.safetensors") for path in GOLDEN.glob("*.plain.safetensors"))

# ---------------------------------------------------------------------------------------------- golden bytes


def golden_layers(
    name: str,
) -> dict[str, tuple[W4A4Solution, LayoutTraits, dict[str, Tensor], dict[str, Tensor]]]:
    """By layer: the plain solution, its traits, the bytes of the reference writer, and inputs with their outputs."""
    plain, packed = (load_file(GOLDEN / f"{name}.{kind}.safetensors") for kind in ("plain", "packed"))
    with safe_open(GOLDEN / f"{name}.plain.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["layers"])
    found = {}
    for layer, facts in said.items():
        of = {key.split("/")[1]: tensor for key, tensor in plain.items() if key.split("/")[0] == layer}
        rows, columns = of["codes"].shape
        solution = W4A4Solution(
            plan=W4A4Plan(Linear(layer, columns, rows, "bias" in of), Int4(), of["lora_down"].shape[1]),
            smooth=of["smooth"],
            down=of["lora_down"].T.contiguous(),
            up=of["lora_up"],
            codes=of["codes"],
            scales=of["wscale"],
            outer=None,
            bias=of.get("bias"),
        )
        stored = {key[len(layer) + 1 :]: t for key, t in packed.items() if key.rpartition(".")[0] == layer}
        found[layer] = (solution, LayoutTraits(unsigned=facts["act_unsigned"]), stored, of)
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_layer_has_the_bytes_of_the_reference_writer(name: str):
    for layer, (solution, traits, stored, _) in golden_layers(name).items():
        encoded = COMFY.encode(solution, traits)
        assert encoded.keys() == stored.keys()
        assert [key for key in stored if not same_bits(encoded[key], stored[key])] == [], layer
        back = COMFY.decode(solution.plan, stored, traits)
        assert isinstance(back, W4A4Solution)
        for field in ("smooth", "down", "up", "codes", "scales", "bias"):
            assert same_bits(getattr(back, field), getattr(solution, field)), (layer, field)


@pytest.mark.parametrize("name", FILES)
def test_stored_layers_compute_the_golden_outputs(name: str):
    """Of the file as it is: the golden unsigned layers carry a bias that no shift was folded into."""
    for layer, (solution, traits, _, of) in golden_layers(name).items():
        y = w4a4_exact(of["x"].float(), solution, unsigned_from=0 if traits.unsigned else None)
        if traits.unsigned:
            weight = (
                solution.codes.float().unflatten(1, (-1, 64)) * solution.scales.float().unsqueeze(-1)
            ).flatten(1)
            y = y + GELU_SHIFT * (weight / solution.smooth.float()).sum(1)
        error = float((y - of["y_fp32"]).norm() / of["y_fp32"].norm())
        # y_fp32 quantizes the float32 quotient, we the 16-bit one that the op computes: single codes flip
        assert error < 0.06, layer


# ---------------------------------------------------------------------------------------------- comfy-kitchen itself


def kitchen_linear(stored: dict[str, Tensor], x: Tensor) -> Tensor:
    """The released op on the tensors of one module of a file, as a loader that reads its marker hands them over."""
    pytest.importorskip("comfy_kitchen", reason="needs comfy-kitchen (pip install comfy-kitchen)")
    from tools.kitchen import kitchen_weight

    weight = kitchen_weight(dict(stored), x.dtype)
    return torch.nn.functional.linear(x, weight, stored.get("bias"))


@pytest.mark.parametrize(
    "module",
    [
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_attn.proj",
        "double_blocks.0.txt_mlp.0",
        "double_blocks.0.img_mlp.2",  # unsigned activations, shift folded into the bias
        "single_blocks.0.linear1",  # two branches side by side
        "single_blocks.0.linear2",
        "double_blocks.0.txt_mod.lin",  # awq_w4a16
        "single_blocks.0.modulation.lin",
    ],
)
def test_comfy_kitchens_op_computes_our_layers(converted_flux, module: str):
    """On a layer of a file that svdq wrote, against our reference runtime, layer by layer of the model."""
    path = converted_flux("int4") / "comfy.safetensors"
    checkpoint = open_checkpoint(path)
    stored = {k.rpartition(".")[2]: t for k, t in load_file(path).items() if k.rpartition(".")[0] == module}
    held = next(m for m in checkpoint.file.modules if m.name == module)
    columns = held.plan.linear.in_features
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    if module.endswith("_mlp.2"):
        x = torch.nn.functional.gelu(2 * x, approximate="tanh")
    ours = torch.cat([exact_output(checkpoint, layer, x) for layer in held.layers], dim=1)

    def error(theirs: Tensor) -> float:
        return float((theirs.float() - ours).norm() / ours.norm())

    wide = {key: t.float() if t.dtype == torch.bfloat16 else t for key, t in stored.items()}
    # the same numbers in float32: what is left is the bias of unsigned layers, which the file rounds to 16 bits
    assert error(kitchen_linear(wide, x)) < 1e-3
    # as stored the op rounds every step to bfloat16, and single codes of the activation flip
    assert error(kitchen_linear(stored, x.to(torch.bfloat16))) < 0.06


def exact_output(checkpoint: Checkpoint, layer: LayerPlan, x: Tensor) -> Tensor:
    """(M, N) float32 of the stored numbers, rounded nowhere on the way."""
    solution = checkpoint.solution(layer)
    if isinstance(solution, W4A4Solution):
        return w4a4_exact(x, widened(solution), unsigned_from=checkpoint.unsigned_from(layer))
    assert isinstance(solution, W4A16Solution)
    weight = w4a16_weight(solution)
    return x @ weight.T if solution.bias is None else x @ weight.T + solution.bias.float()


def widened(solution: W4A4Solution) -> W4A4Solution:
    """The same numbers in float32, so that nothing is rounded on the way."""
    tensors = {name: getattr(solution, name) for name in ("smooth", "down", "up", "scales", "bias")}
    return replace(solution, **{name: None if t is None else t.float() for name, t in tensors.items()})


# ---------------------------------------------------------------------------------------------- refusals


def test_nvfp4_is_refused_before_any_work(tiny_flux: Path, tmp_path: Path):
    from svdq_cli.conversion.convert import convert
    from svdq_cli.recipe import Output, Quantization, default_recipe

    recipe = default_recipe(
        str(tiny_flux),
        quantization=Quantization.model_validate({"precision": "nvfp4", "rank": 16, "effort": "datafree"}),
        outputs=[Output(format="comfy", path="x")],
    )
    with pytest.raises(UsageError, match="comfy stores int4, not nvfp4"):
        convert(recipe, tmp_path / "x.safetensors")


def test_a_modulation_has_the_tensors_that_comfyui_reads_and_is_read_back_bit_for_bit():
    """Those of `comfy-core`, whose bytes are held against comfy-kitchen's own (test_comfy_core.py)."""
    plan = w4a16_plan(rows=24)  # no multiple of the 128 rows of a W4A4 tile
    solution = random_solution(plan)
    stored = COMFY.encode(solution)
    core = format_named("comfy-core").encode(solution)
    assert stored.keys() == core.keys() == COMFY.tensor_specs(plan, torch.bfloat16).keys()
    assert [key for key in stored if key != "comfy_quant" and not same_bits(stored[key], core[key])] == []
    for marker in (stored["comfy_quant"], core["comfy_quant"]):
        assert json.loads(marker.numpy().tobytes()) == {"format": "awq_w4a16", "group_size": 64}
    assert differing_fields(COMFY.decode(plan, stored), solution) == []


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (W4A16Plan(Linear("a", 96, 24, bias=True)), "in_features 96 is not a multiple of 64"),
        (W4A4Plan(Linear("a", 128, 24, bias=True), Int4(), 16), "out_features 24 is not a multiple of 128"),
        (
            W4A4Plan(Linear("a", 128, 128, bias=True), NvFp4(), 16),
            "comfy has no nvfp4 with a low-rank branch",
        ),
    ],
)
def test_what_the_op_cannot_run_is_refused_with_the_reason(plan: LayerPlan, reason: str):
    assert COMFY.unsupported_reason(plan) == reason


def test_a_modulation_whose_marker_says_other_groups_is_refused():
    plan = w4a16_plan()
    stored = COMFY.encode(random_solution(plan))
    other = b'{"format":"awq_w4a16","group_size":128}'
    with pytest.raises(InputError, match="says 128 instead of 64"):
        COMFY.decode(plan, {**stored, "comfy_quant": torch.tensor(list(other), dtype=torch.uint8)})


def test_a_marker_that_says_another_algorithm_or_sign_is_refused():
    plan = w4a4_plan(precision=Int4())
    stored = COMFY.encode(random_solution(plan))
    with pytest.raises(InputError, match="activations are signed"):
        COMFY.decode(plan, stored, LayoutTraits(unsigned=True))
    other = {**stored, "comfy_quant": torch.tensor(list(b'{"format":"awq_w4a16"}'), dtype=torch.uint8)}
    with pytest.raises(InputError, match="'awq_w4a16' instead of 'svdquant_w4a4'"):
        COMFY.decode(plan, other)
