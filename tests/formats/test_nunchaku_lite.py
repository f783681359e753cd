"""The nunchaku-lite format: golden bytes, exact round trips, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats import DEFAULT, format_named
from svdq_cli.formats.soundness import specs_of
from svdq_cli.records import (
    Int4,
    LayerPlan,
    Linear,
    NvFp4,
    Precision,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.storage.tensor_file import TensorSpec
from tests.formats.solutions import (
    differing_fields,
    model_plan,
    random_solution,
    same_bits,
    w4a4_plan,
    w4a16_plan,
)

GOLDEN = Path(__file__).parents[1] / "golden"
LITE = format_named("nunchaku-lite")
BOTH: tuple[Precision, ...] = (Int4(), NvFp4())
LITE_SUFFIX = {"smooth": "smooth_factor", "lora_down": "proj_down", "lora_up": "proj_up"}


def golden_lite_tensors(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the classic exporter wrote, under the names and with the outer scales of nunchaku-lite."""
    stored = {key.removeprefix("dc."): tensor for key, tensor in file.items() if key.startswith("dc.")}
    del stored["smooth_orig"]
    stored = {LITE_SUFFIX.get(key, key): tensor for key, tensor in stored.items()}
    return stored | {
        key.removeprefix("lite."): tensor for key, tensor in file.items() if key.startswith("lite.")
    }


def golden_solution(file: dict[str, Tensor], precision: Precision, *, outer_per_row: bool) -> W4A4Solution:
    rows, columns = file["in.weight"].shape
    outer = file["ref.outer_scale"].flatten() if "ref.outer_scale" in file else None
    assert outer is None or (outer.numel() == rows) == outer_per_row
    return W4A4Solution(
        plan=W4A4Plan(Linear("layer", columns, rows, True), precision, file["in.lora_a"].shape[0]),
        smooth=file["in.smooth"],
        down=file["stored.lora_down"],
        up=file["in.lora_b"],
        codes=file["ref.codes"],
        scales=file["ref.scales"],
        outer=outer,
        bias=file["stored.bias"],
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("e2e_*.safetensors")))
def test_a_w4a4_layer_is_stored_in_the_golden_bytes(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    precision = NvFp4() if "nvfp4" in name else Int4()
    solution = golden_solution(file, precision, outer_per_row="channel" in name)
    stored, golden = LITE.encode(solution), golden_lite_tensors(file)
    assert stored.keys() == golden.keys()
    assert [key for key in golden if not same_bits(stored[key], golden[key])] == []
    assert differing_fields(LITE.decode(solution.plan, golden), solution) == []


def test_a_w4a16_layer_is_stored_in_the_golden_bytes() -> None:
    file = load_file(GOLDEN / "awq_32x128_split1.safetensors")
    plan = W4A16Plan(Linear("layer", 128, 32, True))
    codes = (file["in.codes"] + 7).to(torch.uint8)
    solution = W4A16Solution(plan, codes, file["in.scales"], -(file["in.scales"] * 7), file["in.bias"])
    stored = LITE.encode(solution)
    assert stored.keys() == {"qweight", "wscales", "wzeros", "bias"}
    assert [key for key in stored if not same_bits(stored[key], file[f"packed.{key}"])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(128, 128, 16), (384, 128, 48), (128, 640, 32), (256, 384, 112)]
)
@pytest.mark.parametrize("precision", BOTH)
def test_a_w4a4_solution_survives_the_round_trip_bit_for_bit(
    precision: Precision, rows: int, columns: int, rank: int, bias: bool, dtype: torch.dtype
) -> None:
    plan = w4a4_plan(precision=precision, rows=rows, columns=columns, rank=rank, bias=bias)
    for outer_per_row in (False, True):
        solution = random_solution(plan, dtype=dtype, outer_per_row=outer_per_row)
        stored = LITE.encode(solution)
        assert specs_of(stored) == LITE.tensor_specs(plan, dtype)
        assert differing_fields(LITE.decode(plan, stored), solution) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (24, 192), (264, 1088)])
def test_a_w4a16_solution_survives_the_round_trip_bit_for_bit(
    rows: int, columns: int, bias: bool, dtype: torch.dtype
) -> None:
    plan = w4a16_plan(rows=rows, columns=columns, bias=bias)
    solution = random_solution(plan, dtype=dtype)
    stored = LITE.encode(solution)
    assert specs_of(stored) == LITE.tensor_specs(plan, dtype)
    assert differing_fields(LITE.decode(plan, stored), solution) == []


def test_stored_tensors_own_their_memory() -> None:
    """A bias that shares memory with its solution, or two tensors with each other, can't be written to a file."""
    for plan in (w4a4_plan(precision=NvFp4()), w4a16_plan()):
        solution = random_solution(plan)
        stored = LITE.encode(solution)
        assert all(tensor.is_contiguous() for tensor in stored.values())
        assert len({tensor.data_ptr() for tensor in stored.values()}) == len(stored)
        assert solution.bias is not None
        assert solution.bias.data_ptr() not in {tensor.data_ptr() for tensor in stored.values()}


def test_the_unused_outer_scale_of_nvfp4_is_one() -> None:
    plan = w4a4_plan(precision=NvFp4())
    per_tensor = LITE.encode(random_solution(plan))
    assert bool((per_tensor["wcscales"] == 1).all())
    assert float(per_tensor["wtscale"]) != 1
    per_row = LITE.encode(random_solution(plan, outer_per_row=True))
    assert float(per_row["wtscale"]) == 1


def test_both_outer_scales_in_use_are_multiplied_where_that_is_exact() -> None:
    plan = w4a4_plan(precision=NvFp4())
    solution = random_solution(plan, outer_per_row=True)
    assert isinstance(solution, W4A4Solution)
    assert solution.outer is not None
    stored = LITE.encode(solution)
    halved = LITE.decode(plan, {**stored, "wtscale": torch.tensor([0.5], dtype=torch.bfloat16)})
    assert isinstance(halved, W4A4Solution)
    assert halved.outer is not None
    assert torch.equal(halved.outer, solution.outer * 0.5)
    with pytest.raises(InputError, match="wtscale and wcscales are both in use"):
        LITE.decode(plan, {**stored, "wtscale": torch.tensor([1.0078125], dtype=torch.bfloat16)})


@pytest.mark.parametrize("precision", BOTH)
def test_every_wrong_tensor_is_named_with_its_layer(precision: Precision) -> None:
    plan = w4a4_plan(precision=precision)
    stored = LITE.encode(random_solution(plan))
    for key in stored:
        rest = {name: tensor for name, tensor in stored.items() if name != key}
        with pytest.raises(InputError, match=rf"blocks\.0\.to_q: {key} is missing"):
            LITE.decode(plan, rest)
        with pytest.raises(InputError, match=rf"blocks\.0\.to_q: {key} has the shape"):
            LITE.decode(plan, {**stored, key: stored[key][:-1]})
        with pytest.raises(InputError, match=rf"blocks\.0\.to_q: {key} has the dtype torch\.float32 instead"):
            LITE.decode(plan, {**stored, key: stored[key].float()})
    with pytest.raises(InputError, match="smooth_factor_orig does not belong here") as refusal:
        LITE.decode(plan, {**stored, "smooth_factor_orig": stored["smooth_factor"]})
    assert refusal.value.where == plan.name


def test_a_bias_that_the_source_layer_lacks_is_refused() -> None:
    plan = w4a4_plan(precision=Int4(), bias=False)
    stored = LITE.encode(random_solution(plan))
    with pytest.raises(InputError, match="bias does not belong here"):
        LITE.decode(plan, {**stored, "bias": torch.zeros(128, dtype=torch.bfloat16)})


def test_nan_and_a_zero_to_divide_by_are_refused_on_the_way_in_and_out() -> None:
    plan = w4a4_plan(precision=NvFp4())
    solution = random_solution(plan)
    assert isinstance(solution, W4A4Solution)
    stored = LITE.encode(solution)
    for key in ("wscales", "proj_up", "wcscales"):
        damaged = stored[key].clone()
        damaged[0] = float("nan")
        count = damaged[0].numel()
        with pytest.raises(InputError, match=f"to_q: {key} holds {count} values that are not finite"):
            LITE.decode(plan, {**stored, key: damaged})
    smooth = solution.smooth.clone()
    smooth[3] = 0
    with pytest.raises(ValueError, match="smooth holds 1 zeros"):
        LITE.encode(replace(solution, smooth=smooth))
    with pytest.raises(ValueError, match="up holds 2048 values that are not finite"):
        LITE.encode(replace(solution, up=solution.up / 0))


def test_a_solution_that_contradicts_its_plan_is_refused() -> None:
    solution = random_solution(w4a4_plan(precision=NvFp4()))
    assert isinstance(solution, W4A4Solution)
    for changed, message in (
        (replace(solution, outer=None), "outer is missing"),
        (replace(solution, bias=None), "bias is missing"),
        (replace(solution, down=solution.down.T), r"down has the shape \(128, 16\) instead of \(16, 128\)"),
        (
            replace(solution, up=solution.up.half()),
            "up has the dtype torch.float16 instead of torch.bfloat16",
        ),
        (replace(solution, smooth=solution.smooth.float()), "float32 is not a 16-bit dtype"),
        (replace(solution, plan=w4a4_plan(precision=Int4())), "outer does not belong here"),
    ):
        with pytest.raises(ValueError, match=rf"blocks\.0\.to_q: .*{message}"):
            LITE.encode(changed)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (w4a4_plan(precision=Int4(), rows=200), "out_features 200 is not a multiple of 128"),
        (w4a4_plan(precision=NvFp4(), columns=192), "in_features 192 is not a multiple of 128"),
        (w4a4_plan(precision=Int4(), rank=0), "it has no low-rank branch, which Nunchaku's kernels need"),
        (w4a4_plan(precision=Int4(), rank=17), "rank 17 is not a multiple of 16 from 16 to 1024"),
        (w4a4_plan(precision=Int4(), rank=1040), "rank 1040 is not a multiple of 16 from 16 to 1024"),
        (w4a16_plan(rows=12), "out_features 12 is not a multiple of 8"),
        (w4a16_plan(columns=96), "in_features 96 is not a multiple of 64"),
        (w4a4_plan(precision=Int4()), None),
        (w4a16_plan(rows=8, columns=64), None),
    ],
)
def test_a_layer_that_does_not_fit_the_kernels_gets_a_reason(plan: LayerPlan, reason: str | None) -> None:
    assert LITE.unsupported_reason(plan) == reason
    if reason is not None:
        with pytest.raises(UsageError, match=reason) as refusal:
            LITE.metadata(model_plan(plan), torch.bfloat16)
        assert refusal.value.where == plan.name


def test_metadata_is_what_diffusers_documents_and_comes_back() -> None:
    plan = model_plan(
        w4a4_plan("a.to_q", precision=NvFp4(), rank=32),
        w4a16_plan("a.norm.linear"),
        w4a4_plan("a.to_k", precision=NvFp4(), rank=32),
    )
    config = LITE.metadata(plan, torch.float16)
    assert json.loads(json.dumps(config)) == {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "float16",
        "svdq_w4a4": {"precision": "nvfp4", "group_size": 16, "rank": 32, "targets": ["a.to_q", "a.to_k"]},
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": ["a.norm.linear"]},
    }
    facts = LITE.parse_metadata(config)
    assert (facts.w4a4, facts.w4a16) == (("a.to_q", "a.to_k"), ("a.norm.linear",))
    assert (facts.precision, facts.rank, facts.dtype) == (NvFp4(), 32, torch.float16)


def test_a_plan_of_one_role_has_one_section() -> None:
    assert "awq_w4a16" not in LITE.metadata(model_plan(w4a4_plan(precision=Int4())), torch.bfloat16)
    config = LITE.metadata(model_plan(w4a16_plan()), torch.bfloat16)
    assert "svdq_w4a4" not in config
    assert LITE.parse_metadata(config).rank is None


def test_two_ranks_in_one_file_are_refused_with_the_names() -> None:
    plan = model_plan(
        *(w4a4_plan(f"blocks.{i}.to_q", precision=Int4(), rank=64 if i == 2 else 32) for i in range(5))
    )
    with pytest.raises(UsageError, match=r"one rank per file; 4 layers have rank 32, but rank 64: blocks\.2"):
        LITE.metadata(plan, torch.bfloat16)


def test_two_precisions_in_one_file_are_refused() -> None:
    plan = model_plan(w4a4_plan("a", precision=Int4()), w4a4_plan("b", precision=NvFp4()))
    with pytest.raises(UsageError, match="one precision per file"):
        LITE.metadata(plan, torch.bfloat16)


def test_a_plan_without_quantized_layers_and_a_wide_dtype_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one quantized layer"):
        LITE.metadata(model_plan(), torch.bfloat16)
    with pytest.raises(UsageError, match="not float32"):
        LITE.metadata(model_plan(w4a16_plan()), torch.float32)


def test_layer_plans_are_rebuilt_from_metadata_and_tensor_headers() -> None:
    plan = model_plan(
        w4a4_plan("a.to_q", precision=Int4(), rows=384, columns=256, rank=32, bias=False),
        w4a16_plan("a.norm.linear", rows=24, columns=192),
    )
    specs = {
        f"{layer.name}.{suffix}": spec
        for layer in plan.layers
        for suffix, spec in LITE.tensor_specs(layer, torch.bfloat16).items()
    }
    facts = LITE.parse_metadata(LITE.metadata(plan, torch.bfloat16))
    assert LITE.layer_plans(facts, specs) == plan.layers
    del specs["a.to_q.qweight"]
    with pytest.raises(InputError, match=r"a\.to_q: qweight is missing"):
        LITE.layer_plans(facts, specs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gguf"}, "quant_method is 'gguf'"),
        ({"compute_dtype": "float32"}, "compute_dtype is 'float32'"),
        ({"svdq_w4a4": None}, "both missing"),
        ({"svdq_w4a4": []}, "svdq_w4a4 must be a JSON object"),
        ({"precision": "int3"}, "precision is 'int3'"),
        ({"group_size": 16}, "group_size must be 64"),
        ({"rank": "32"}, "rank must be a whole number"),
        ({"rank": None}, "rank must be a whole number"),
        ({"targets": []}, "targets must be a list"),
        ({"targets": ["a", 1]}, "targets must be a list"),
        ({"targets": ["a", "b", "a"]}, "names a layer twice: a"),
        ({"awq_w4a16": {"precision": "int4", "group_size": 128, "targets": ["c"]}}, "group_size of 64"),
        ({"awq_w4a16": {"precision": "int4", "group_size": 64, "targets": ["a"]}}, "names a layer twice: a"),
    ],
)
def test_unclear_metadata_is_refused_by_key(change: dict[str, object], message: str) -> None:
    config = LITE.metadata(model_plan(w4a4_plan("a", precision=Int4())), torch.bfloat16)
    section = json.loads(json.dumps(config["svdq_w4a4"]))
    for key, value in change.items():
        (section if key in section else config)[key] = value
    if "svdq_w4a4" not in change:
        config["svdq_w4a4"] = section
    with pytest.raises(InputError, match=message):
        LITE.parse_metadata(config)


def test_predicted_bytes_are_the_bytes_that_are_stored() -> None:
    plan = w4a4_plan(precision=NvFp4(), rows=256, columns=384, rank=48)
    predicted = sum(spec.bytes for spec in LITE.tensor_specs(plan, torch.bfloat16).values())
    assert predicted == sum(tensor.nbytes for tensor in LITE.encode(random_solution(plan)).values())
    assert TensorSpec((3, 5), torch.float16).bytes == 30


def test_a_checkpoint_is_recognized_by_its_config(tmp_path: Path) -> None:
    component = tmp_path / "pipe" / "transformer"
    component.mkdir(parents=True)
    assert not LITE.recognizes(tmp_path / "pipe")
    assert not LITE.recognizes(tmp_path / "nowhere")
    config = component / "config.json"
    for text in ("not JSON", "[]", "{}", '{"quantization_config": {"quant_method": "gguf"}}'):
        config.write_text(text)
        assert not LITE.recognizes(tmp_path / "pipe")
        assert not LITE.recognizes(config)
    config.write_text('{"quantization_config": {"quant_method": "nunchaku_lite"}}')
    assert LITE.recognizes(tmp_path / "pipe")
    assert LITE.recognizes(component)


def test_formats_are_found_by_name_only() -> None:
    assert DEFAULT == "nunchaku-lite"
    with pytest.raises(UsageError, match="unknown format 'nunchaku_lite'") as refusal:
        format_named("nunchaku_lite")
    assert refusal.value.hint == "did you mean 'nunchaku-lite'?"
