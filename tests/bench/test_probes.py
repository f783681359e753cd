"""The Hopper probes compile for Hopper, and what they feed the GPU is what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svdq_cli.bench import probes
from svdq_cli.gpu.compile import Variant, compile_variant, read_source
from svdq_cli.gpu.nvrtc import CompileError
from svdq_cli.storage.resources import data_root
from tests.gpu.test_compile import needs_nvrtc
from tests.tools.test_kernel_report import needs_nvdisasm
from tools.sass import Loop, main_loop

VARIANTS = [
    Variant("probes/wgmma_exact", ()),
    *(Variant("probes/wgmma_rate", (("OPERAND", o), ("PROMOTE", p))) for o in (0, 1) for p in (0, 2)),
    Variant("probes/wgmma_rate", (("OPERAND", 2), ("PROMOTE", 0))),
    Variant("probes/mma_rate", (("PROMOTE", 2),)),
    probes.l2_variant(),
    *(
        Variant("probes/shared_wavefronts", (("PATTERN", pattern),))
        for pattern in range(len(probes.SHARED_LOADS))
    ),
]


@needs_nvrtc
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.label)
def test_every_probe_compiles_for_hopper_without_spills(variant: Variant, tmp_path: Path):
    usage = compile_variant(variant, "sm_90a", cache=tmp_path).usage
    assert (usage.spill_bytes, usage.stack_bytes) == (0, 0)


def test_all_probes_are_compiled_here():
    files = {path.stem for path in (data_root("kernels") / "probes").glob("*.cu")}
    assert files == {variant.entry for variant in VARIANTS}


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize("operand", [0, 1])
def test_the_probe_of_two_scales_multiplies_by_both_in_every_group(operand: int, tmp_path: Path):
    """The product of factors that no group changes was taken before the loop once: nothing was measured."""

    def loop(promote: int) -> Loop:
        variant = Variant("probes/wgmma_rate", (("OPERAND", operand), ("PROMOTE", promote)))
        return main_loop(compile_variant(variant, "sm_90a", cache=tmp_path).path)

    row, both = loop(1), loop(2)
    groups = sum(1 for _ in both.products) // 2
    assert (both.count("FMUL"), both.count("FFMA")) == (64 * groups, 64 * groups)
    assert both.count("LDS") == 8 * groups
    assert row.count("FMUL") == row.count("LDS") == 0


def test_no_probe_reads_outside_its_shared_memory():
    """The descriptor's offsets are those of the layout; a second reading of the manual would reach far beyond it."""
    source = read_source("probes/wgmma_exact")
    assert source.count("matrix_descriptor(") == 2
    assert "matrix_descriptor(rows, 64 * 16, 8 * 16)" in source  # 2 k16 columns of 64 rows of 16 bytes
    assert "matrix_descriptor(columns, 128 * 16, 8 * 16)" in source


@needs_nvrtc
def test_warpgroup_instructions_are_refused_elsewhere(tmp_path: Path):
    with pytest.raises(CompileError, match="compile for sm_90a"):
        compile_variant(VARIANTS[0], "sm_120a", cache=tmp_path)


@pytest.mark.parametrize("codes", [torch.arange(-8, 8), torch.arange(16)])
def test_both_codings_hold_every_code_exactly(codes: torch.Tensor):
    normal = probes.e4m3_codes(codes, "normal").view(torch.float8_e4m3fn).double()
    subnormal = probes.e4m3_codes(codes, "subnormal").view(torch.float8_e4m3fn).double()
    assert torch.equal(normal, codes.double())
    assert torch.equal(subnormal * 512, codes.double())


def test_core_matrices_are_8_rows_by_16_bytes():
    matrix = torch.arange(64 * 64).reshape(64, 64)
    found = probes.core_matrices(matrix)
    assert found.shape == (2, 2, 8, 8, 16)
    assert torch.equal(found[1, 0, 3, 5], matrix[8 * 3 + 5, 32:48])
