"""How work is cut into blocks."""

from __future__ import annotations

import pytest
import torch

from svdq_cli.errors import UsageError
from svdq_cli.gpu.launcher import splits_of
from svdq_cli.runtime.ops import records
from svdq_cli.runtime.ops.records import Product, sizes_of
from tests.gpu.emulation import EmulatedDevice


@pytest.mark.parametrize(
    ("blocks", "k", "splits"),
    [
        (128, 3072, 2),  # an image's 4096 rows on 132 multiprocessors: two blocks each, not one
        (264, 3072, 1),
        (16, 3072, 3),  # no fewer than two groups a warp
        (1, 12288, 8),
    ],
)
def test_two_blocks_of_the_quantizer_share_a_multiprocessor(blocks: int, k: int, splits: int):
    assert splits_of(EmulatedDevice(multiprocessors=132), blocks, k) == splits


def test_an_operand_that_32_bits_cant_index_is_refused(monkeypatch: pytest.MonkeyPatch):
    codes, weight = torch.empty(2, 4, 32, 4), torch.empty(2, 8, 32, 4)
    product = Product(weight, weight, torch.empty(0, 8, 32, 8), None, None)
    assert sizes_of((codes, codes, codes), product) == (64, 128, 128, 0)
    monkeypatch.setattr(records, "MOST_WORDS", codes.numel())
    with pytest.raises(UsageError, match="an operand of 16,384 codes"):
        sizes_of((codes, codes, codes), product)
