"""What the tensors of a single file say where its header is lost: tools that open a safetensors file and save it again
keep the tensors only. Which model it is can't be read off them, and comes from a base."""

from __future__ import annotations

from collections.abc import Mapping

from svdq_cli.storage.tensor_file import TensorSpec


def suffixes_of(specs: Mapping[str, TensorSpec]) -> set[str]:
    """The last part of every tensor's name: "qweight", "proj_down"."""
    return {name.rpartition(".")[2] for name in specs}


def widest_branch(specs: Mapping[str, TensorSpec]) -> int:
    """The largest rank among the down projections, stored as (K, R); 0 without any."""
    ranks = [
        spec.shape[-1]
        for name, spec in specs.items()
        if name.endswith((".proj_down", ".lora_down")) and spec.shape
    ]
    return max(ranks, default=0)
