"""vLLM-Omni files: golden bytes, and the object that belongs into config.json."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats import format_named
from svdq_cli.pack.row_major import pack_rows, unpack_rows
from svdq_cli.records import Int4, Linear, NvFp4, W4A4Plan, W4A4Solution
from tests.formats.solutions import differing_fields, model_plan, random_solution, same_bits, w4a4_plan

GOLDEN = Path(__file__).parents[1] / "golden"
OMNI = format_named("vllm-omni")


@pytest.mark.parametrize("name", ["pack_nvfp4_128x128_r16", "pack_nvfp4_256x256_r32"])
def test_codes_and_scales_have_the_golden_bytes(name: str):
    file = load_file(GOLDEN / f"{name}.safetensors")
    rows, columns = file["in.codes"].shape
    solution = W4A4Solution(
        plan=W4A4Plan(Linear("layer", columns, rows, True), NvFp4(), len(file["in.lora_down"])),
        smooth=file["in.smooth"],
        down=file["in.lora_down"],
        up=file["in.lora_up"],
        codes=file["in.codes"],
        scales=file["in.scales"],
        outer=file["in.wcscales"],
        bias=file["in.bias"],
    )
    stored = OMNI.encode(solution)
    for key in ("qweight", "wscales"):
        assert same_bits(stored[key], file[f"rowmajor.{key}"]), key
    # everything else lies in its natural order, unlike in the files of Nunchaku's kernels
    assert same_bits(stored["smooth_factor"], file["in.smooth"])
    assert same_bits(stored["bias"], file["in.bias"])
    assert same_bits(stored["wcscales"], file["in.wcscales"])
    assert same_bits(stored["proj_down"], file["in.lora_down"].T.contiguous())
    assert differing_fields(OMNI.decode(solution.plan, stored), solution) == []


@pytest.mark.parametrize("kind", ["tensor_128x128", "channel_384x128"])
def test_both_outer_scales_are_there_and_the_unused_one_is_one(kind: str):
    file = load_file(GOLDEN / f"e2e_nvfp4_{kind}_r16.safetensors")
    rows, columns = file["ref.codes"].shape
    solution = W4A4Solution(
        plan=W4A4Plan(Linear("layer", columns, rows, True), NvFp4(), 16),
        smooth=file["in.smooth"],
        down=file["stored.lora_down"],
        up=file["in.lora_b"],
        codes=file["ref.codes"],
        scales=file["ref.scales"],
        outer=file["ref.outer_scale"].flatten(),
        bias=file["stored.bias"],
    )
    stored = OMNI.encode(solution)
    for key in ("wcscales", "wtscale"):
        assert same_bits(stored[key], file[f"rowmajor.{key}"]), key
    assert differing_fields(OMNI.decode(solution.plan, stored), solution) == []


@pytest.mark.parametrize("shape", [(1, 2), (17, 34), (128, 64)])
@pytest.mark.parametrize("precision", [Int4(), NvFp4()])
def test_rows_of_codes_come_back(shape: tuple[int, int], precision: Int4 | NvFp4):
    low, high = (-8, 8) if isinstance(precision, Int4) else (0, 16)
    codes = torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_rows(pack_rows(codes, precision), precision), codes)
    with pytest.raises(ValueError, match="codes must be in"):
        pack_rows(codes + 16, precision)


def test_the_quantization_config_names_what_stays_at_16_bits():
    from dataclasses import replace

    plan = replace(
        model_plan(w4a4_plan("layers.0.attention.to_qkv", precision=NvFp4())),
        kept=(Linear("t_embedder.mlp.0", 128, 128, True),),
    )
    assert OMNI.metadata(plan, torch.bfloat16) == {
        "quantization_config": {
            "quant_method": "svdquant",
            "precision": "nvfp4",
            "rank": 16,
            "act_unsigned": False,
            "modules_to_not_convert": ["t_embedder.mlp.0"],
        }
    }
    with pytest.raises(UsageError, match="bfloat16 only"):
        OMNI.metadata(plan, torch.float16)


def test_a_kept_name_inside_a_quantized_one_is_refused():
    """The runtime skips modules by substring, and would skip the quantized one, too."""
    from dataclasses import replace

    plan = replace(
        model_plan(w4a4_plan("layers.0.proj_out", precision=NvFp4())),
        kept=(Linear("proj_out", 128, 128, True),),
    )
    with pytest.raises(UsageError, match="proj_out occurs in its name"):
        OMNI.metadata(plan, torch.bfloat16)


def test_missing_tensors_are_named():
    plan = w4a4_plan(precision=NvFp4())
    stored = OMNI.encode(random_solution(plan))
    del stored["wtscale"]
    with pytest.raises(InputError, match="wtscale is missing"):
        OMNI.decode(plan, stored)
