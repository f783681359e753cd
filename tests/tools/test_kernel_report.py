"""What the report of the kernels' main loops counts, and the counts that the kernels are held to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.gpu import variants
from svdq_cli.gpu.architectures import architecture
from svdq_cli.gpu.compile import compile_variant
from svdq_cli.records import Int4, NvFp4, Precision
from svdq_cli.runtime import ops
from tests.gpu.test_compile import needs_nvrtc
from tools import kernel_report
from tools.sass import disassembler, main_loop, main_loop_of


def _no_disassembler() -> bool:
    try:
        disassembler()
    except EnvironmentLacksError:
        return True
    return False


needs_nvdisasm = pytest.mark.skipif(
    _no_disassembler(), reason="needs nvdisasm: pip install nvidia-cuda-nvdisasm"
)

# A loop that copies in all threads, in one warp scales too, and waits; another loop multiplies less.
LISTING = """\
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/              @P0 BRA `(.L_x_2) ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R7], [R2.64] ;
        /*0030*/              @P1 BRA `(.L_x_3) ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R7+0x100], [R4.64] ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R7], [R8.64] ;
.L_x_3:
        /*0080*/                   IMMA.16864.S4.S4 R96, R72.ROW, R104.COL, R48 ;
        /*0090*/              @!P2 FFMA R1, R2, R3, R4 ;
        /*00a0*/              @P3 BRA `(.L_x_1) ;
.L_x_4:
        /*00b0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00c0*/              @P3 BRA `(.L_x_4) ;
        /*00d0*/                   EXIT ;
"""


def test_the_loop_with_the_most_products_is_counted_on_the_way_with_the_most_copies():
    loop = main_loop_of(LISTING)
    assert list(loop.products) == [("int4", 16 * 8 * 64)]
    assert (len(loop.instructions), loop.issued) == (10, 8)
    assert (loop.count("LDGSTS"), loop.count("FFMA", "FMUL")) == (3, 1)


def test_products_of_every_unit_are_counted_and_waits_are_not():
    lines = {
        "IMMA.16832.U8.S8 R4, R8.ROW, R2.COL, R4": ("int8", 16 * 8 * 32),
        "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X R4, R8, R2, R4": ("fp4", 16 * 8 * 64),
        "QGMMA.64x192x32.F32.E4M3.E4M3 R4, R8, gdesc[UR4]": ("fp8", 64 * 192 * 32),
        "HGMMA.64x192x16.F32.BF16 R4, gdesc[UR4]": ("16 bit", 64 * 192 * 16),
        "HGMMA.64x8x16.F32 RZ, gdesc[URZ], RZ, gsb0": None,
    }
    for line, wanted in lines.items():
        listing = f".L_x_1:\n /*0000*/ {line} ;\n /*0010*/ HMMA.16816.F32 R4, R8, R2, R4 ;\n /*0020*/ BRA `(.L_x_1) ;\n"
        found = list(main_loop_of(listing).products)
        assert found == [*([wanted] if wanted else []), ("16 bit", 16 * 8 * 16)], line


def test_code_without_products_has_no_main_loop():
    with pytest.raises(ValueError, match="no loop of this kernel"):
        main_loop_of(".L_x_1:\n /*0000*/ FFMA R1, R2, R3, R4 ;\n /*0010*/ BRA `(.L_x_1) ;\n")


# Issued by a warp for 64 columns. Above 256 for int4 on RTX 30 and 40 the tensor cores would wait for instructions.
MOST = {
    ("int4", "sm_80"): 256,
    ("int4", "sm_86"): 256,
    ("int4", "sm_89"): 256,
    ("int4", "sm_90a"): 360,
    ("int4", "sm_120a"): 340,
    ("nvfp4", "sm_89"): 820,
    ("nvfp4", "sm_120a"): 80,
}


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize(("precision", "target"), MOST, ids=str)
@pytest.mark.parametrize("op", [ops.w4a4_gemm, ops.w4a4_gelu_quantize], ids=["gemm", "gelu"])
def test_a_step_of_the_main_loop_issues_no_more_than_this(op, precision: str, target: str, tmp_path: Path):
    number: Precision = Int4() if precision == "int4" else NvFp4()
    variant = op.variant(torch.bfloat16, number, architecture(target), block_m=variants.BLOCK_M)
    cubin = compile_variant(variant, target, cache=tmp_path)
    loop = main_loop(cubin.path)
    assert loop.issued <= MOST[precision, target]
    assert cubin.usage.spill_bytes == 0
    # A thread copies one vector of either operand, some a vector of scales; the branch's copies are another way
    assert loop.count("LDGSTS") <= 5


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize("product", [pair for pair in variants.STEP_CYCLES if pair[1] != "sm_121a"], ids=str)
def test_blocks_are_chosen_by_what_the_report_counts(product: tuple[str, str], tmp_path: Path):
    """Another NVRTC may count a few instructions more; the choice is not so fine."""
    name, target = product
    precision: Precision = Int4() if name == "int4" else NvFp4()
    card = next(card for card in kernel_report.CARDS if card.target == target)
    for block_m, wanted in zip(
        (variants.BLOCK_M, variants.LARGE_BLOCK_M), variants.STEP_CYCLES[product], strict=True
    ):
        variant = ops.w4a4_gemm.variant(torch.bfloat16, precision, architecture(target), block_m=block_m)
        row = kernel_report._row(card, "w4a4_gemm", variant, tmp_path)
        assert row.predicted_cycles == pytest.approx(wanted, rel=0.06)
        assert row.usage.spill_bytes == 0


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize("target", ["sm_86", "sm_89"])
def test_a_large_block_issues_less_and_reads_less_for_the_same_products(target: str, tmp_path: Path):
    card = next(card for card in kernel_report.CARDS if card.target == target)
    usual, large = (
        kernel_report._row(
            *(card, "w4a4_gemm int4"),
            ops.w4a4_gemm.variant(torch.bfloat16, Int4(), architecture(target), block_m=block_m),
            tmp_path,
        )
        for block_m in (variants.BLOCK_M, variants.LARGE_BLOCK_M)
    )
    assert large.tensor_cycles == 2 * usual.tensor_cycles
    assert large.loop.issued / large.tensor_cycles <= 0.82
    assert (large.bytes_a_cycle or 0) <= 0.76 * (usual.bytes_a_cycle or 0)


def test_every_card_of_the_report_is_a_target():
    assert {card.target for card in kernel_report.CARDS} == {
        *("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a"),
    }


@needs_nvrtc
@needs_nvdisasm
def test_the_report_says_what_bounds_a_loop(tmp_path: Path):
    card = next(card for card in kernel_report.CARDS if card.name == "A100")
    variant = ops.w4a4_gemm.variant(torch.bfloat16, Int4(), architecture("sm_80"), block_m=variants.BLOCK_M)
    row = kernel_report._row(card, "w4a4_gemm int4", variant, tmp_path)
    assert Counter(kind for kind, _ in row.loop.products) == {"int4": 16}
    assert row.tensor_cycles == 16 * 8
    assert row.float_cycles == 2 * row.loop.count("FFMA", "FMUL")  # 16 lanes a scheduler
    assert row.most_share == row.tensor_cycles / row.float_cycles
    assert kernel_report.line_of(row).startswith("| A100 | w4a4_gemm int4 | ")
