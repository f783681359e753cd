"""How many tokens of each input a calibration keeps: as many as the recipe allows, and no more than there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svdq_cli.calibration.budget import (
    covariance_rows_bytes,
    covariance_tokens,
    covariances_bytes,
    rows_bytes,
    rows_within,
)
from svdq_cli.calibration.covariance import images_for_covariance
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.records import ModelPlan, RotatedPlan, W4A4Plan
from svdq_cli.sampling.token_counts import TokenCounts


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """How many tokens of each input are kept, at most, by the input's name."""

    widths: Mapping[str, int]  # K
    rows: Mapping[str, int]
    covariance_tokens: Mapping[str, int]  # over how many tokens its covariance is taken; 0 for none

    @property
    def bytes(self) -> int:
        """What the statistics take at most."""
        return self._rows_bytes + covariances_bytes(self._widths, list(self.covariance_tokens.values()))

    @property
    def part_bytes(self) -> int:
        """What the files of all batches take at most, until they are merged."""
        return self._rows_bytes + covariance_rows_bytes(self._widths, list(self.covariance_tokens.values()))

    @property
    def _widths(self) -> list[int]:
        return list(self.widths.values())

    @property
    def _rows_bytes(self) -> int:
        return rows_bytes(self._widths, list(self.rows.values()))


def kept_tokens(prepared: Prepared, wanted: Sampling, tokens: TokenCounts) -> KeptTokens:
    """What a calibration that samples as `wanted` keeps. `tokens`: what each layer reads for one image in a
    pass."""
    names = [shared.name for shared in prepared.plan.inputs]
    rows, covariances = token_limits(prepared, wanted)
    passes = wanted.settings.steps * tokens.passes.count
    of_image = {shared.name: passes * tokens.by_layer[shared.layers[0]] for shared in prepared.plan.inputs}
    kept = {name: min(rows, wanted.samples * of_image[name]) for name in names}
    learned = images_for_covariance(wanted.samples)
    over = {
        name: min(limit, learned * of_image[name]) for name, limit in zip(names, covariances, strict=True)
    }
    return KeptTokens(
        widths=dict(zip(names, input_widths(prepared.plan), strict=True)),
        rows=kept,
        # where they are no more than the rows, these say as much
        covariance_tokens={name: count if (count := over[name]) > kept[name] else 0 for name in names},
    )


def token_limits(prepared: Prepared, wanted: Sampling) -> tuple[int, list[int]]:
    """The rows that may be kept of every input, and over how many tokens the covariance of each may be taken (0 for
    those that nothing would use it of)."""
    rows = rows_within(input_widths(prepared.plan), rows=wanted.rows, budget=wanted.size_bytes)
    return rows, tokens_for_covariances(prepared, rows=rows, budget=wanted.size_bytes)


def tokens_for_covariances(prepared: Prepared, *, rows: int, budget: int) -> list[int]:
    """Over how many tokens the covariance of each input is taken, at most; 0 for those that nothing would use it of."""
    plans, rounded = prepared.plan.by_name, "gptq" in prepared.settings.steps
    used = [
        rounded and any(isinstance(plans[name], (W4A4Plan, RotatedPlan)) for name in shared.layers)
        for shared in prepared.plan.inputs
    ]
    return covariance_tokens(input_widths(prepared.plan), used, rows=rows, budget=budget)


def input_widths(plan: ModelPlan) -> list[int]:
    """K of every shared input."""
    widths = {layer.name: layer.linear.in_features for layer in plan.layers}
    return [widths[shared.layers[0]] for shared in plan.inputs]
