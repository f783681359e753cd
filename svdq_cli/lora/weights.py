"""A converted model's weights, some rows at a time, for LoRAs whose change depends on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from svdq_cli.adapters.read import Adapter
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.errors import InputError
from svdq_cli.solve.rebuild import rebuilt_weight


@dataclass(slots=True, eq=False)
class CheckpointWeights:
    """`WeightRows` of a checkpoint: of a 4-bit layer, what its codes and branch represent. The last weight is kept."""

    checkpoint: Checkpoint
    _name: str = ""
    _weight: Tensor | None = field(default=None)

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        if self._weight is None or self._name != name:
            layer = name.removesuffix(".weight")
            plan = self.checkpoint.by_name.get(layer)
            self._weight = (
                self.checkpoint.kept_tensor(name)
                if plan is None
                else rebuilt_weight(self.checkpoint.solution(plan))
            )
            self._name = name
        return self._weight[start:stop]


def require_same_base(adapter: Adapter) -> Adapter:
    """The adapter. InputError for one that takes a part out of the 16-bit weights, which a converted model lacks."""
    if adapter.changed_base is None:
        return adapter
    raise InputError(
        f"{adapter.path}: {adapter.changed_base}: the adapter subtracts a part of the 16-bit weights, but a converted "
        "model no longer has them",
        hint="convert the 16-bit model with --lora, or make it a plain LoRA with peft: "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        where=str(adapter.path),
        kind="lora",
    )
