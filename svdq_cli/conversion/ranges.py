"""Numbers that the output's dtype does not hold: what was seen while calibrating, against what will run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from svdq_cli.calibration.artefact import InputEntry
from svdq_cli.records import ModelPlan

_SPARE = 2.0  # other prompts and 4-bit layers reach further than what calibration saw
_NAMED = 3


def range_warnings(plan: ModelPlan, seen: Sequence[InputEntry], dtype: torch.dtype) -> tuple[str, ...]:
    """What to warn of where activations came near the largest number of `dtype`, or beyond: the layers, the worst
    first. bfloat16 holds all that float32 does."""
    largest = torch.finfo(dtype).max
    readers = {shared.name: shared.layers for shared in plan.inputs}
    quantized = {layer.name for layer in plan.layers}
    peaks: dict[str, float] = {}
    for entry in seen:
        for layer in quantized & {*readers.get(entry.name, ()), *entry.output_peaks}:
            peaks[layer] = max(entry.peak or 0.0, entry.output_peaks.get(layer, 0.0))
    worst = sorted(
        (layer for layer, peak in peaks.items() if peak * _SPARE > largest), key=lambda n: -peaks[n]
    )
    if not worst:
        return ()
    named = ", ".join(f"{layer} ({peaks[layer]:.3g})" for layer in worst[:_NAMED])
    others = f" and {len(worst) - _NAMED} more layers" if len(worst) > _NAMED else ""
    beyond = peaks[worst[0]] > largest
    return (
        f"{str(dtype)[6:]} holds numbers up to {largest:g}, but activations "
        f"{'go beyond that' if beyond else 'come close to that'} in {named}{others}: "
        f"images {'will' if beyond else 'may'} be black. Convert with dtype: bfloat16",
    )
