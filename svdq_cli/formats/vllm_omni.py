"""vLLM-Omni's `svdquant`: nvfp4 in rows, every vector in its natural order, bfloat16. Besides the
weights, the runtime needs `quantization_config` in the component's config.json; the file's header carries the same
object.

The runtime has two outer scales and multiplies by both. One that the tensor shares (`wtscale`) is loaded without regard
to fused projections, so those store theirs by row (`wcscales`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.errors import InputError, UsageError
from svdq_cli.formats.contract import PLAIN, Branch, Format, LayoutTraits, PackedFacts
from svdq_cli.formats.implied import suffixes_of, widest_branch
from svdq_cli.formats.json_keys import bad_key, json_object, optional_section, whole_number
from svdq_cli.formats.soundness import (
    outer_of_both,
    require_one_value,
    require_sound,
    require_sound_tensors,
    sixteen_bit_dtype,
)
from svdq_cli.pack.row_major import pack_rows, unpack_rows
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

NAME = "vllm-omni"
METHOD = "svdquant"
QUANTIZATION = "quantization_config"
FUSED_RANKS = 32


class VllmOmni(Format):
    """A file for vLLM-Omni."""

    name = NAME
    precisions = (NvFp4(),)

    def unsupported_reason(self, layer: LayerPlan) -> str | None:
        """Why the runtime can't hold this module in 4 bits, or None."""
        match layer:
            case RotatedPlan():
                return self.scheme_reason(layer)
            case W4A16Plan():
                return "vllm-omni keeps modulation layers at 16 bits"
            case W4A4Plan(precision=Int4()):
                return "vllm-omni runs nvfp4 only"
            case W4A4Plan(rank=rank) if rank < 1:
                return f"rank {rank} is not positive"
            case _:
                columns = layer.linear.in_features
                return f"in_features {columns} is not a multiple of 16" if columns % NvFp4.group else None

    def tensor_specs(
        self, layer: LayerPlan, dtype: torch.dtype, traits: LayoutTraits = PLAIN
    ) -> dict[str, TensorSpec]:
        plan = _w4a4(layer)
        rows, columns = plan.linear.out_features, plan.linear.in_features
        specs = {
            "qweight": TensorSpec((rows, columns // 2), torch.int8),
            "wscales": TensorSpec((columns // NvFp4.group, rows), torch.float8_e4m3fn),
            "smooth_factor": TensorSpec((columns,), dtype),
            "proj_down": TensorSpec((columns, plan.rank), dtype),
            "proj_up": TensorSpec((rows, plan.rank), dtype),
            "wcscales": TensorSpec((rows,), dtype),
            "wtscale": TensorSpec((1,), dtype),
        }
        if plan.linear.bias:
            specs["bias"] = TensorSpec((rows,), dtype)
        return specs

    def encode(self, solution: LayerSolution, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        if reason := self.unsupported_reason(solution.plan):
            raise ValueError(f"{solution.plan.name}: {reason}")
        require_sound(solution)
        if not isinstance(solution, W4A4Solution) or solution.outer is None:
            raise ValueError(f"{solution.plan.name} is not an nvfp4 layer")
        outer, rows = solution.outer, solution.plan.linear.out_features
        whole = outer.numel() == 1
        tensors = {
            "qweight": pack_rows(solution.codes, NvFp4()),
            "wscales": solution.scales.view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn),
            "smooth_factor": solution.smooth.clone(),
            **self.encode_branch(Branch(solution.down, solution.up)),
            "wcscales": outer.new_ones(rows) if whole else outer.clone(),
            "wtscale": outer.clone() if whole else outer.new_ones(1),
        }
        if solution.bias is not None:
            tensors["bias"] = solution.bias.clone()
        return tensors

    def decode(
        self, layer: LayerPlan, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN
    ) -> LayerSolution:
        plan = _w4a4(layer)
        require_sound_tensors(layer, self.tensor_specs(layer, sixteen_bit_dtype(tensors), traits), tensors)
        branch = self.decode_branch(tensors)
        return W4A4Solution(
            plan=plan,
            smooth=tensors["smooth_factor"].clone(),
            down=branch.down,
            up=branch.up,
            codes=unpack_rows(tensors["qweight"], NvFp4()),
            scales=tensors["wscales"].view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn),
            outer=outer_of_both(layer.name, tensors["wtscale"], tensors["wcscales"]),
            bias=tensors["bias"].clone() if "bias" in tensors else None,
        )

    def encode_branch(self, branch: Branch, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        return {"proj_down": branch.down.T.contiguous(), "proj_up": branch.up.clone()}

    def decode_branch(self, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN) -> Branch:
        return Branch(tensors["proj_down"].T.contiguous(), tensors["proj_up"].clone())

    def metadata(self, plan: ModelPlan, dtype: torch.dtype) -> dict[str, object]:
        """`quantization_config`, as it belongs into config.json. UsageError where the format can't hold the plan."""
        if dtype != torch.bfloat16:
            raise UsageError("vllm-omni computes in bfloat16 only", hint="set model.dtype: bfloat16")
        if not plan.w4a4:
            raise UsageError("vllm-omni needs W4A4 layers, and the plan has none")
        require_one_value(self.name, "rank", plan.w4a4, lambda layer: layer.rank)
        kept = [linear.name for linear in plan.kept]
        # the runtime skips every module in whose name one of these occurs
        for layer in plan.w4a4:
            if mistaken := next((name for name in kept if name in layer.name), None):
                raise UsageError(
                    f"vllm-omni would keep {layer.name} at 16 bits too, because {mistaken} occurs in its name",
                    where=layer.name,
                )
        return {
            QUANTIZATION: {
                "quant_method": METHOD,
                "precision": NvFp4.name,
                "rank": plan.w4a4[0].rank,
                "act_unsigned": False,
                "modules_to_not_convert": kept,
            }
        }

    def warnings(self, plan: ModelPlan) -> tuple[str, ...]:
        rank = plan.w4a4[0].rank
        if not rank % FUSED_RANKS:
            return ()
        return (
            f"rank {rank}: FlashInfer's fused nvfp4 kernels take multiples of {FUSED_RANKS}; with another rank this "
            "file will stay on slower ones",
        )

    def parse_metadata(self, config: Mapping[str, object]) -> PackedFacts:
        section = optional_section(config, QUANTIZATION)
        if section is None or section.get("quant_method") != METHOD:
            raise bad_key("quant_method", f"is not {METHOD!r}")
        if section.get("precision") != NvFp4.name:
            raise bad_key("precision", f"is {section.get('precision')!r} instead of {NvFp4.name!r}")
        return PackedFacts((), (), NvFp4(), whole_number(section, "rank", where=QUANTIZATION), torch.bfloat16)

    def layer_plans(self, facts: PackedFacts, specs: Mapping[str, TensorSpec]) -> tuple[LayerPlan, ...]:
        plans: list[LayerPlan] = []
        for key, spec in specs.items():
            name, _, suffix = key.rpartition(".")
            if suffix != "qweight":
                continue
            down = specs.get(f"{name}.proj_down")
            if len(spec.shape) != 2 or down is None or len(down.shape) != 2:
                raise InputError(
                    f"{name}: qweight and proj_down must both be present, with two axes each", where=name
                )
            linear = Linear(name, spec.shape[1] * 2, spec.shape[0], f"{name}.bias" in specs)
            plans.append(W4A4Plan(linear, NvFp4(), down.shape[1]))
        return tuple(plans)

    def recognizes(self, path: Path) -> bool:
        text = header_metadata(path).get(QUANTIZATION) if path.is_file() else None
        try:
            section = json_object(json.loads(text)) if text is not None else None
        except ValueError:
            return False
        return section is not None and section.get("quant_method") == METHOD

    def implied_metadata(self, specs: Mapping[str, TensorSpec]) -> dict[str, object] | None:
        suffixes = suffixes_of(specs)
        if not {"qweight", "wscales", "wtscale", "proj_down"} <= suffixes or "smooth_factor_orig" in suffixes:
            return None
        section = {"quant_method": METHOD, "precision": NvFp4.name, "rank": widest_branch(specs)}
        return {QUANTIZATION: section}


FORMAT = VllmOmni()


def _w4a4(layer: LayerPlan) -> W4A4Plan:
    if not isinstance(layer, W4A4Plan):
        raise ValueError(f"{layer.name}: vllm-omni holds W4A4 modules only")
    return layer
