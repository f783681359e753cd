"""ComfyUI's `svdquant_w4a4`, tile-packed: what comfy-kitchen's op computes. int4 only.

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
from svdq_cli.formats.contract import PLAIN, Branch, Format, LayoutTraits, PackedFacts
from svdq_cli.formats.headers import FORMAT as FORMAT_KEY
from svdq_cli.formats.implied import suffixes_of
from svdq_cli.formats.json_keys import json_object
from svdq_cli.formats.soundness import require_16_bit, require_sound, require_sound_tensors, sixteen_bit_dtype
from svdq_cli.pack.kitchen import (
    COLUMNS,
    ROWS,
    bytes_text,
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
)
from svdq_cli.storage.headers import header_metadata
from svdq_cli.storage.tensor_file import TensorSpec

NAME = "comfy"
MARKER = "comfy_quant"
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
            case W4A16Plan():
                return "comfy keeps modulation layers at 16 bits"
            case W4A4Plan(precision=NvFp4()):
                return "comfy has no nvfp4 with a low-rank branch"
            case W4A4Plan(rank=rank) if rank < 1:
                return f"rank {rank} is not positive"
            case _:
                pass
        rows, columns = layer.linear.out_features, layer.linear.in_features
        if rows % ROWS:
            return f"out_features {rows} is not a multiple of {ROWS}"
        if columns % COLUMNS:
            return f"in_features {columns} is not a multiple of {COLUMNS}"
        return None

    def tensor_specs(
        self, layer: LayerPlan, dtype: torch.dtype, traits: LayoutTraits = PLAIN
    ) -> dict[str, TensorSpec]:
        plan = _w4a4(layer)
        rows, columns = plan.linear.out_features, plan.linear.in_features
        specs = {
            "weight": TensorSpec((rows // ROWS, columns // COLUMNS, 32, 128), torch.int8),
            "weight_scale": TensorSpec((rows // ROWS, columns // COLUMNS, ROWS), dtype),
            "smooth_factor": TensorSpec((columns,), dtype),
            "proj_down": TensorSpec((columns, plan.rank), dtype),
            "proj_up": TensorSpec((rows // ROWS, plan.rank, ROWS), dtype),
            MARKER: TensorSpec((len(_marker(traits)),), torch.uint8),
        }
        if plan.linear.bias:
            specs["bias"] = TensorSpec((rows,), dtype)
        return specs

    def encode(self, solution: LayerSolution, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        if reason := self.unsupported_reason(solution.plan):
            raise ValueError(f"{solution.plan.name}: {reason}")
        require_sound(solution)
        if not isinstance(solution, W4A4Solution):
            raise ValueError(f"{solution.plan.name} is not a W4A4 layer")
        tensors = {
            "weight": pack_kitchen_codes(solution.codes),
            "weight_scale": pack_kitchen_rows(solution.scales),
            "smooth_factor": solution.smooth.clone(),
            **self.encode_branch(Branch(solution.down, solution.up)),
            MARKER: text_bytes(_marker(traits)),
        }
        if solution.bias is not None:
            tensors["bias"] = solution.bias.clone()
        return tensors

    def decode(
        self, layer: LayerPlan, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN
    ) -> LayerSolution:
        plan = _w4a4(layer)
        _require_marker(plan, tensors, traits)
        sixteen = {suffix: tensor for suffix, tensor in tensors.items() if suffix != MARKER}
        specs = self.tensor_specs(layer, sixteen_bit_dtype(sixteen), traits)
        require_sound_tensors(
            layer, {suffix: spec for suffix, spec in specs.items() if suffix != MARKER}, sixteen
        )
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
        plans: list[LayerPlan] = []
        for key in specs:
            name, _, suffix = key.rpartition(".")
            if suffix != MARKER:
                continue
            weight, up = specs.get(f"{name}.weight"), specs.get(f"{name}.proj_up")
            if weight is None or up is None or len(weight.shape) != 4 or len(up.shape) != 3:
                raise InputError(
                    f"{name}: weight and proj_up of a {LAYOUT} module must have four and three axes",
                    where=name,
                    hint="the file is damaged, or packed in another layout of comfy-kitchen",
                )
            linear = Linear(name, weight.shape[1] * COLUMNS, weight.shape[0] * ROWS, f"{name}.bias" in specs)
            plans.append(W4A4Plan(linear, Int4(), up.shape[1]))
        return tuple(plans)

    def recognizes(self, path: Path) -> bool:
        header = header_metadata(path) if path.is_file() else {}
        return header.get(FORMAT_KEY) == NAME or header.get("target_dtype") == ALGORITHM

    def implied_metadata(self, specs: Mapping[str, TensorSpec]) -> dict[str, object] | None:
        return {} if {MARKER, "proj_down", "smooth_factor"} <= suffixes_of(specs) else None


FORMAT = Comfy()


def _marker(traits: LayoutTraits) -> str:
    """A module's metadata, as comfy-quants spells it: sorted keys, no spaces, `act_unsigned` only where it is true."""
    said: dict[str, object] = {
        "format": ALGORITHM,
        "layout": LAYOUT,
        "lowrank_branch_input_basis": "raw",
        "proj_down_smooth_folded": True,
    }
    if traits.unsigned:
        said["act_unsigned"] = True
    return json.dumps(said, sort_keys=True, separators=(",", ":"))


def _require_marker(plan: W4A4Plan, tensors: Mapping[str, Tensor], traits: LayoutTraits) -> None:
    """InputError unless the module's own metadata says what its layout does."""
    marker = tensors.get(MARKER)
    try:
        said = json_object(json.loads(bytes_text(marker))) if marker is not None else None
    except ValueError:
        said = None
    if said is None:
        raise InputError(f"{plan.name}: {MARKER} is missing or not a JSON object", where=plan.name)
    if said.get("format") != ALGORITHM:
        raise InputError(
            f"{plan.name}: {MARKER} says {said.get('format')!r} instead of {ALGORITHM!r}", where=plan.name
        )
    if bool(said.get("act_unsigned")) != traits.unsigned:
        raise InputError(
            f"{plan.name}: {MARKER} says that its activations are "
            f"{'unsigned' if said.get('act_unsigned') else 'signed'}, but svdq expects the opposite",
            where=plan.name,
            hint="svdq reads only comfy files that svdq convert wrote",
        )


def _w4a4(layer: LayerPlan) -> W4A4Plan:
    if not isinstance(layer, W4A4Plan):
        raise ValueError(f"{layer.name}: comfy holds W4A4 modules only")
    return layer
