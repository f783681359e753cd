"""Files for ComfyUI as comfy-kitchen reads them and its eager operators multiply them, in torch on a CPU.

Modules are read the way ComfyUI's loader reads one (`comfy/ops.py`, `_load_quantized_module`, commit 0271a469): the
`comfy_quant` of each chooses the layout, whose parameters are the module's other tensors. ComfyUI has no
`svdquant_w4a4`; its modules are read in the same way here.
"""

# comfy-kitchen is in a folder of its own
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.pack.kitchen import COLUMNS, ROWS

MARKER, SMOOTHING = "comfy_quant", "pre_quant_scale"


def kitchen_weight(stored: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A module's tensors, by suffix, as comfy-kitchen's tensor, for activations of `dtype`. Takes what it reads out of
    `stored`. SystemExit for a quantization that comfy-kitchen does not have."""
    from comfy_kitchen import tensor as kitchen

    said = json.loads(stored.pop(MARKER).numpy().tobytes())
    weight = stored.pop("weight")
    rotation = int(said.get("convrot_groupsize", 256))
    shape = (weight.shape[0], 2 * weight.shape[-1])
    match said["format"]:
        case "convrot_w4a4":
            layout = kitchen.TensorCoreConvRotW4A4Layout
            params = {"scale": stored.pop("weight_scale"), "convrot_groupsize": rotation}
            params |= {"quant_group_size": 64, "linear_dtype": said.get("linear_dtype", "int4")}
        case "asym_w4a8_int8":
            layout = kitchen.AsymW4A8Int8Layout
            params = {
                "scale": stored.pop("weight_s_rel"),
                "s_channel": stored.pop("weight_s_channel"),
                "codebook": stored.pop("weight_codebook"),
                "group_size": int(said.get("group_size", 16)),
                "convrot_groupsize": rotation,
            }
        case "awq_w4a16":
            layout = kitchen.TensorCoreAWQW4A16Layout
            params = {
                "scale": stored.pop("weight_scale"),
                "zeros": stored.pop("weight_zeros"),
                "group_size": int(said.get("group_size", 64)),
            }
            dtype = params["scale"].dtype  # which it computes in
        case "nvfp4":
            layout = kitchen.TensorCoreNVFP4Layout
            params = {"scale": stored.pop("weight_scale_2"), "block_scale": stored.pop("weight_scale")}
        case "svdquant_w4a4":
            layout = kitchen.TensorCoreSVDQuantW4A4Layout
            names = {"scale": "weight_scale", "smooth_factor": "smooth_factor"}
            names |= {"proj_down": "proj_down", "proj_up": "proj_up"}
            wide: dict[str, object] = {
                parameter: stored.pop(name).to(dtype) for parameter, name in names.items()
            }
            params = {**wide, "act_unsigned": bool(said.get("act_unsigned"))}
            shape = (weight.shape[0] * ROWS, weight.shape[1] * COLUMNS)
        case other:
            raise SystemExit(f"comfy-kitchen has no quantization format {other!r}")
    made = layout.Params(**params, orig_dtype=dtype, orig_shape=shape)
    return kitchen.QuantizedTensor(weight, layout.__name__, made)


def kitchen_modules(file: Path, dtype: torch.dtype) -> tuple[dict[str, KitchenModule], set[str]]:
    """Every quantized module of a file, and the keys of all other tensors."""
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in load_file(file).items():
        name, _, suffix = key.rpartition(".")
        by_module[name][suffix] = tensor
    found: dict[str, KitchenModule] = {}
    left: set[str] = set()
    for name, stored in by_module.items():
        if MARKER in stored:
            weight = kitchen_weight(stored, dtype)
            smooth, bias = stored.pop(SMOOTHING, None), stored.pop("bias", None)
            found[name] = KitchenModule(weight, smooth, bias)
        left |= {f"{name}.{suffix}" if name else suffix for suffix in stored}
    return found, left


class KitchenModule(nn.Module):
    """One quantized module of a file. nvfp4's product has no version for CPUs: its two operands are dequantized and
    multiplied.

    `smooth`: what ComfyUI multiplies inputs by before they are quantized, nvfp4's alone.
    """

    def __init__(self, weight: Any, smooth: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.kitchen = [weight]  # in a list: not a parameter to be moved
        self.smooth, self.bias = smooth, bias
        self.is_nvfp4 = "NVFP4" in weight._layout_cls

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) bfloat16, of the input rounded to bfloat16."""
        weight = self.kitchen[0]
        rows = x.to(torch.bfloat16)
        if self.is_nvfp4:
            rows = rows if self.smooth is None else rows * self.smooth
            rows = _nvfp4(rows.flatten(0, -2)).to(weight.dtype).dequantize().reshape(x.shape)
        # two axes: given three with the strides of a slice and no bias, torch takes another way than comfy-kitchen's
        # product, and the input stays at 16 bits
        y = F.linear(rows.to(weight.dtype).reshape(-1, rows.shape[-1]), weight).unflatten(0, x.shape[:-1])
        return (y if self.bias is None else y + self.bias).to(torch.bfloat16)


class KitchenLinear(nn.Module):
    """The rows of one of comfy-kitchen's modules that are one of diffusers' layers."""

    def __init__(self, module: KitchenModule, rows: slice, in_features: int) -> None:
        super().__init__()
        self.module, self.rows = [module], rows
        self.out_features, self.in_features = rows.stop - rows.start, in_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in x's dtype."""
        return self.module[0](x)[..., self.rows].to(x.dtype)


def _nvfp4(rows: Tensor) -> Any:
    """What nvfp4's operator multiplies with, (M, K): ComfyUI gives no scale, so it is the tensor's own."""
    from comfy_kitchen import tensor as kitchen

    return kitchen.QuantizedTensor.from_float(rows, "TensorCoreNVFP4Layout")


def kitchen_layers(checkpoint: Checkpoint, dtype: torch.dtype) -> Mapping[str, KitchenLinear]:
    """Every quantized layer of a checkpoint, run by comfy-kitchen. SystemExit where a loader would find a tensor that
    is none of its."""
    modules, left = kitchen_modules(checkpoint.source.path, dtype)
    if foreign := left - set(checkpoint.kept_specs()) - set(checkpoint.marker_names()):
        raise SystemExit(f"{checkpoint.source.path}: left over: {', '.join(sorted(foreign))}")
    layers: dict[str, KitchenLinear] = {}
    for module in checkpoint.file.modules:
        start = 0
        for layer in module.layers:
            rows = slice(start, start + layer.linear.out_features)
            start = rows.stop
            layers[layer.name] = KitchenLinear(modules[module.name], rows, layer.linear.in_features)
    return layers
