"""A checkpoint whose header has lost its metadata on the way: the format is told by its tensors.

Tools that open a safetensors file and save it again keep the tensors only. What a header says of the packing can be
read off them; which model it is can't, and comes from a base.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from svdq_cli.formats import comfy, nunchaku, vllm_omni
from svdq_cli.formats.contract import Format, TensorSpec
from svdq_cli.records import Int4, NvFp4


def implied_metadata(specs: Mapping[str, TensorSpec]) -> tuple[Format, dict[str, object]] | None:
    """The format of a single file with these tensors, and what its header would say of the packing; None for others."""
    suffixes = {name.rpartition(".")[2] for name in specs}
    if {comfy.MARKER, "proj_down", "smooth_factor"} <= suffixes:
        return comfy.FORMAT, {}
    if not {"qweight", "wscales"} <= suffixes:
        return None
    ranks = [
        spec.shape[-1]
        for name, spec in specs.items()
        if name.endswith((".proj_down", ".lora_down")) and spec.shape
    ]
    rank = max(ranks, default=0)
    if suffixes & {"smooth_factor_orig", "smooth_orig"}:
        # Modulation layers (W4A16) have 16-bit scales in either precision
        eight = any(
            spec.dtype == torch.float8_e4m3fn for name, spec in specs.items() if name.endswith(".wscales")
        )
        precision = NvFp4() if eight else Int4()
        dtype = next(name for name, known in nunchaku.WEIGHT_DTYPES.items() if known == precision)
        section = {"method": nunchaku.METHOD, "weight": {"dtype": dtype}, "rank": rank}
        return nunchaku.FORMAT, {nunchaku.QUANTIZATION: section}
    if {"wtscale", "proj_down"} <= suffixes:
        said = {"quant_method": vllm_omni.METHOD, "precision": NvFp4.name, "rank": rank}
        return vllm_omni.FORMAT, {vllm_omni.QUANTIZATION: said}
    return None
