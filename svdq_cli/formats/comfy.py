"""ComfyUI's `svdquant_w4a4`, tile-packed: what comfy-kitchen's op computes. int4 only. Modulations are `awq_w4a16`.

Every module carries its own metadata, JSON in a uint8 tensor `comfy_quant`; ComfyUI loads a linear without one as an
ordinary 16-bit layer. Smoothing factors, down projections and biases are stored in their natural order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats.comfy_modules import (
    MARKER,
    W4A16_MARKER,
    ZEROS,
    decode_w4a16,
    encode_w4a16,
    said_by_marker,
    w4a16_specs,
)
from svdq_cli.formats.contract import PLAIN, Branch, Format, LayoutTraits, PackedFacts
from svdq_cli.formats.headers import FORMAT as FORMAT_KEY
from svdq_cli.formats.implied import suffixes_of
from svdq_cli.formats.soundness import require_16_bit, require_sound, require_sound_tensors, sixteen_bit_dtype
from svdq_cli.pack.kitchen import (
    COLUMNS,
    ROWS,
    pack_kitchen_codes,
    pack_kitchen_rows,
    text_bytes,
    unpack_kitchen_codes,
    unpack_kitchen_rows,
)
from svdq_cli.records import (
    Int4,
    LayerPlan,
    LayerSolution,
    Linear,
    ModelPlan,
    NvFp4,
    RotatedPlan,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from svdq_cli.storage.headers import header_metadata
from svdq_cli.storage.tensor_file import TensorSpec

NAME = "comfy"
ALGORITHM = "svdquant_w4a4"
LAYOUT = "kitchen_tile_packed_w4a4"
# What comfy-quants, whose files these are the bytes of, writes into the header. No loader reads it.
_HEADER = {
    "artifact_contract": "svdquant_w4a4_kitchen_tilepack.v1",
    "artifact_target": "comfyui_diffusion_model",
    "group_size": str(Int4.group),
    "storage_layout": LAYOUT,
    "target_dtype": ALGORITHM,
    "weight_storage_dtype": "int8",
}


class Comfy(Format):
    """A file for comfy-kitchen's op."""

    name = NAME
    precisions = (Int4(),)
    unsigned_after_gelu = True
    one_rank = False

    def unsupported_reason(self, layer: LayerPlan) -> str | None:
        """Why comfy-kitchen can't run this module in 4 bits, or None."""
        match layer:
            case RotatedPlan():
                return self.scheme_reason(layer)
            case W4A4Plan(precision=NvFp4()):
                return "comfy has no nvfp4 with a low-rank branch"
            case W4A4Plan(rank=rank) if rank < 1:
                return f"rank {rank} is not positive"
            case _:
                pass
        rows, columns = layer.linear.out_features, layer.linear.in_features
        if isinstance(layer, W4A4Plan) and rows % ROWS:
            return f"out_features {rows} is not a multiple of {ROWS}"
        if columns % COLUMNS:
            return f"in_features {columns} is not a multiple of {COLUMNS}"
        return None

    def tensor_specs(
        self, layer: LayerPlan, dtype: torch.dtype, traits: LayoutTraits = PLAIN
    ) -> dict[str, TensorSpec]:
        plan = _stored(layer)
        rows, columns = plan.linear.out_features, plan.linear.in_features
        marker = TensorSpec((len(_marker(plan, traits)),), torch.uint8)
        bias = {"bias": TensorSpec((rows,), dtype)} if plan.linear.bias else {}
        if isinstance(plan, W4A16Plan):
            return {**w4a16_specs(plan, dtype), MARKER: marker, **bias}
        return {
            "weight": TensorSpec((rows // ROWS, columns // COLUMNS, 32, 128), torch.int8),
            "weight_scale": TensorSpec((rows // ROWS, columns // COLUMNS, ROWS), dtype),
            "smooth_factor": TensorSpec((columns,), dtype),
            "proj_down": TensorSpec((columns, plan.rank), dtype),
            "proj_up": TensorSpec((rows // ROWS, plan.rank, ROWS), dtype),
            MARKER: marker,
            **bias,
        }

    def encode(self, solution: LayerSolution, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        if reason := self.unsupported_reason(solution.plan):
            raise ValueError(f"{solution.plan.name}: {reason}")
        require_sound(solution)
        match solution:
            case W4A4Solution():
                tensors = {
                    "weight": pack_kitchen_codes(solution.codes),
                    "weight_scale": pack_kitchen_rows(solution.scales),
                    "smooth_factor": solution.smooth.clone(),
                    **self.encode_branch(Branch(solution.down, solution.up)),
                }
            case W4A16Solution():
                tensors = encode_w4a16(solution)
            case _:  # refused above
                raise AssertionError(solution.plan.name)
        tensors[MARKER] = text_bytes(_marker(solution.plan, traits))
        if solution.bias is not None:
            tensors["bias"] = solution.bias.clone()
        return tensors

    def decode(
        self, layer: LayerPlan, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN
    ) -> LayerSolution:
        plan = _stored(layer)
        _require_marker(plan, tensors, traits)
        sixteen = {suffix: tensor for suffix, tensor in tensors.items() if suffix != MARKER}
        specs = self.tensor_specs(layer, sixteen_bit_dtype(sixteen), traits)
        require_sound_tensors(
            layer, {suffix: spec for suffix, spec in specs.items() if suffix != MARKER}, sixteen
        )
        if isinstance(plan, W4A16Plan):
            return decode_w4a16(plan, tensors)
        branch = self.decode_branch(tensors)
        return W4A4Solution(
            plan=plan,
            smooth=tensors["smooth_factor"].clone(),
            down=branch.down,
            up=branch.up,
            codes=unpack_kitchen_codes(tensors["weight"]),
            scales=unpack_kitchen_rows(tensors["weight_scale"]),
            outer=None,
            bias=tensors["bias"].clone() if "bias" in tensors else None,
        )

    def encode_branch(self, branch: Branch, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        return {"proj_down": branch.down.T.contiguous(), "proj_up": pack_kitchen_rows(branch.up)}

    def decode_branch(self, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN) -> Branch:
        return Branch(tensors["proj_down"].T.contiguous(), unpack_kitchen_rows(tensors["proj_up"]))

    def metadata(self, plan: ModelPlan, dtype: torch.dtype) -> dict[str, object]:
        require_16_bit(self.name, dtype)
        if not plan.w4a4:
            raise UsageError("comfy needs W4A4 layers, and the plan has none")
        return {**_HEADER, "repacked_layer_count": str(len(plan.w4a4))}

    def parse_metadata(self, config: Mapping[str, object]) -> PackedFacts:
        """The header says nothing that the tensors do not."""
        return PackedFacts((), (), Int4(), None, None)

    def layer_plans(self, facts: PackedFacts, specs: Mapping[str, TensorSpec]) -> tuple[LayerPlan, ...]:
        return tuple(
            _plan_of(key.removesuffix(f".{MARKER}"), specs) for key in specs if key.endswith(f".{MARKER}")
        )

    def recognizes(self, path: Path) -> bool:
        header = header_metadata(path) if path.is_file() else {}
        return header.get(FORMAT_KEY) == NAME or header.get("target_dtype") == ALGORITHM

    def implied_metadata(self, specs: Mapping[str, TensorSpec]) -> dict[str, object] | None:
        return {} if {MARKER, "proj_down", "smooth_factor"} <= suffixes_of(specs) else None


FORMAT = Comfy()


def _marker(plan: LayerPlan, traits: LayoutTraits) -> str:
    """A module's metadata, as comfy-quants spells it: sorted keys, no spaces, `act_unsigned` only where it is true."""
    said: dict[str, object] = {
        "format": ALGORITHM,
        "layout": LAYOUT,
        "lowrank_branch_input_basis": "raw",
        "proj_down_smooth_folded": True,
    }
    if traits.unsigned:
        said["act_unsigned"] = True
    return json.dumps(
        W4A16_MARKER if isinstance(plan, W4A16Plan) else said, sort_keys=True, separators=(",", ":")
    )


def _require_marker(plan: W4A4Plan | W4A16Plan, tensors: Mapping[str, Tensor], traits: LayoutTraits) -> None:
    """InputError unless the module's own metadata says what its layout does."""
    said, expected = said_by_marker(plan, tensors), json.loads(_marker(plan, traits))
    for key in ("format", "group_size"):
        if key in expected and said.get(key) != expected[key]:
            raise InputError(
                f"{plan.name}: {MARKER} says {said.get(key)!r} instead of {expected[key]!r}",
                where=plan.name,
                hint="the file is damaged, or packed for another runtime",
            )
    if bool(said.get("act_unsigned")) != traits.unsigned:
        raise InputError(
            f"{plan.name}: {MARKER} says that its activations are "
            f"{'unsigned' if said.get('act_unsigned') else 'signed'}, but svdq expects the opposite",
            where=plan.name,
            hint="svdq reads only comfy files that svdq convert wrote",
        )


def _plan_of(name: str, specs: Mapping[str, TensorSpec]) -> LayerPlan:
    """A stored module from its shapes. InputError for one that is not whole."""
    weight, up = specs.get(f"{name}.weight"), specs.get(f"{name}.proj_up")
    bias = f"{name}.bias" in specs
    if f"{name}.{ZEROS}" in specs and weight is not None and len(weight.shape) == 2:
        return W4A16Plan(Linear(name, 2 * weight.shape[1], weight.shape[0], bias))
    if weight is None or up is None or len(weight.shape) != 4 or len(up.shape) != 3:
        raise InputError(
            f"{name}: weight and proj_up of a {LAYOUT} module must have four and three axes",
            where=name,
            hint="the file is damaged, or packed in another layout of comfy-kitchen",
        )
    linear = Linear(name, weight.shape[1] * COLUMNS, weight.shape[0] * ROWS, bias)
    return W4A4Plan(linear, Int4(), up.shape[1])


def _stored(layer: LayerPlan) -> W4A4Plan | W4A16Plan:
    if isinstance(layer, RotatedPlan):
        raise ValueError(f"{layer.name}: comfy holds W4A4 and W4A16 modules only")
    return layer
