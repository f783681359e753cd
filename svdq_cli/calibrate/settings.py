"""How pictures are drawn, for calibration and for evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass

from svdq_cli.errors import UsageError


@dataclass(frozen=True, slots=True)
class DrawSettings:
    """`None` leaves a setting to the pipeline. Picture i is seeded with `seed + i`, whatever its batch.

    `true_cfg` above 1 draws with a second, unconditional pass (an empty negative prompt) where the pipeline has one.
    """

    steps: int
    guidance: float | None
    height: int  # pixels
    width: int  # pixels
    seed: int
    max_sequence_length: int | None = None  # text tokens
    batch_size: int = 1
    true_cfg: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "height", "width", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}", hint=f"give {name} a value of 1 or more")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}", hint="give a seed of 0 or more")
