"""Weights on their way to the device: the same numbers whether they are read ahead or when they are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svdq_cli.conversion.read_weights import READ_AT_ONCE, raw_weight, reading_bytes, source_weight
from svdq_cli.errors import InputError
from svdq_cli.records import Int4, Linear, W4A4Plan
from svdq_cli.source import Source, open_source, read_header
from tests.allocations import Allocations

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Merged:
    """As what a LoRA adds: the lowest bits of a row depend on how many are computed together."""

    file: Path
    origin: str
    shape: tuple[int, ...]
    dtype: str = "F32"

    def read(self) -> Tensor:
        return self.read_rows(0, self.shape[0])

    def read_rows(self, start: int, stop: int) -> Tensor:
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        return (
            torch.arange(start, stop)
            .float()
            .add(1e-3 * (stop - start))
            .reshape(-1, 1)
            .repeat(1, self.shape[1])
        )


def plan_of(shape: tuple[int, ...]) -> W4A4Plan:
    return W4A4Plan(Linear("layer", shape[1], shape[0], bias=False), Int4(), 32)


def test_rows_are_read_in_the_same_pieces_both_ways(tiny_flux: Path):
    source, shape = open_source(tiny_flux), (5, READ_AT_ONCE // 2)
    source = replace(source, tensors={"layer.weight": Merged(tiny_flux, "layer.weight", shape)})
    ahead = raw_weight(source, plan_of(shape)).on(CPU).weight
    assert torch.equal(ahead, source_weight(source, plan_of(shape), CPU).weight)
    assert ahead[:, 0].tolist() == pytest.approx([0.002, 1.002, 2.002, 3.002, 4.001])


def stored(folder: Path, tiny_flux: Path, weight: Tensor) -> Source:
    file = folder / "one.safetensors"
    save_file({"layer.weight": weight}, file)
    return replace(open_source(tiny_flux), tensors=dict(read_header(file)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(READ_AT_ONCE // 512 + 77, 512), (130, 64, 1, 1)])
def test_what_is_stored_arrives_and_takes_little_beside_itself(
    dtype: torch.dtype, shape: tuple[int, ...], tiny_flux: Path, tmp_path: Path
):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    source = stored(tmp_path, tiny_flux, weight)
    raw = raw_weight(source, plan_of(shape))
    assert raw.weight.dtype == dtype
    assert torch.equal(raw.weight, weight)
    with Allocations() as seen:
        read = source_weight(source, plan_of(shape), CPU).weight
    assert torch.equal(read, weight.flatten(1).float())
    assert seen.most <= 4 * weight.numel() + reading_bytes(weight.numel())


@pytest.mark.parametrize("read", [raw_weight, lambda source, plan: source_weight(source, plan, CPU)])
def test_nan_in_the_last_row_is_named(read, tiny_flux: Path, tmp_path: Path):
    weight = torch.zeros(READ_AT_ONCE // 512 + 1, 512)
    weight[-1, -1] = float("nan")
    with pytest.raises(InputError, match=r"layer\.weight holds NaN"):
        read(stored(tmp_path, tiny_flux, weight), plan_of(tuple(weight.shape)))
