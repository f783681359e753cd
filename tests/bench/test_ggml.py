"""ggml beside ours: what its blocks mean, and that a bench without it says nothing of it."""

from __future__ import annotations

import pytest
import torch

from svdq_cli.bench.cpu_operations import cpu_baselines
from svdq_cli.bench.ggml import FOLDER, Q4_0, Q8_0, _values, ggml


def test_blocks_are_a_scale_and_the_codes_of_32_weights():
    scale = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    nibbles = torch.arange(16, dtype=torch.uint8) | 8 << 4
    four = torch.cat((scale, nibbles)).reshape(1, 1, -1)
    assert _values(four, Q4_0)[0].tolist() == [(i - 8) / 2 for i in range(16)] + [0.0] * 16
    eight = torch.cat((scale, torch.arange(-16, 16, dtype=torch.int8).view(torch.uint8))).reshape(1, 1, -1)
    assert _values(eight, Q8_0)[0].tolist() == [i / 2 for i in range(-16, 16)]


def test_without_its_libraries_there_is_no_row_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(FOLDER, raising=False)
    ggml.cache_clear()
    assert [name for name, _ in cpu_baselines(64)] == ["torch._weight_int4pack_mm_for_cpu", "torch._int_mm"]
    assert [name for name, _ in cpu_baselines(1)] == ["torch._weight_int4pack_mm_for_cpu"]
