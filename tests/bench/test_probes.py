"""The Hopper probes compile for Hopper, and what they feed the GPU is what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svdq_cli.bench import probes
from svdq_cli.gpu.compile import Variant, compile_variant
from svdq_cli.gpu.nvrtc import CompileError
from svdq_cli.storage.resources import data_root
from tests.gpu.test_compile import needs_nvrtc

VARIANTS = [
    Variant("probes/wgmma_exact", ()),
    *(Variant("probes/wgmma_rate", (("OPERAND", o), ("PROMOTE", p))) for o in (0, 1) for p in (0, 2)),
    Variant("probes/wgmma_rate", (("OPERAND", 2), ("PROMOTE", 0))),
    Variant("probes/mma_rate", (("PROMOTE", 2),)),
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
