"""Which tokens calibration keeps as rows.

Rows are sampled by turn, not by chance. A *turn* is one image in one call of a layer: with one pass a step, an image
of 20 steps has 20 turns; a conditional and an unconditional pass make 40. Every image gets an equal share of the
rows, spread evenly over its turns; within a turn the rows are evenly strided tokens. Where shares do not divide, the
golden ratio shifts where they fall, so that neither a timestep nor a token position is preferred. Inputs with equal
numbers of turns and tokens keep the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from svdq_cli.calibration.covariance import images_for_covariance
from svdq_cli.errors import UsageError

_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples mod 1 fill [0, 1) as evenly as any sequence can
_SILVER = math.sqrt(2) - 1  # another irrational, so that seeds shift the golden sequence


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How sampled rows are spread over images, turns and tokens."""

    rows: int  # of an input, over all images
    images: int
    seed: int
    # by input: of how many tokens the covariance is taken, if any
    covariance_tokens: Mapping[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UsageError(f"rows is {self.rows}", hint="keep 1 row or more")

    def for_covariance(self, name: str) -> RowSampling | None:
        """How the tokens of an input are spread whose covariance is taken, over the images that the search may learn
        from; None where it is not."""
        tokens, images = self.covariance_tokens.get(name, 0), images_for_covariance(self.images)
        return RowSampling(tokens, images, self.seed) if tokens and images else None

    def share(self, *, image: int, turn: int, turns: int) -> int:
        """Rows that this turn may keep. All turns of all images together keep `rows`."""
        if turn >= turns or image >= self.images:
            return 0
        of_image = self.rows * (image + 1) // self.images - self.rows * image // self.images
        shift = _fraction(image * _GOLDEN + self.seed * _SILVER)
        return math.floor((turn + 1) * of_image / turns + shift) - math.floor(turn * of_image / turns + shift)

    def tokens(self, *, image: int, turn: int, turns: int, count: int) -> list[int]:
        """Indices of the tokens that a turn keeps of its `count`, ascending and evenly strided."""
        share = self.share(image=image, turn=turn, turns=turns)
        if share >= count:
            return list(range(count))
        shift = _fraction((image * turns + turn + 1) * _GOLDEN + self.seed * _SILVER)
        return [min(int((i + shift) * count / share), count - 1) for i in range(share)]


def _fraction(value: float) -> float:
    return value - math.floor(value)
