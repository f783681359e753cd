"""The model's last linear, which stays at 16 bits, fitted to what the 4-bit blocks before it hand over.

Ours. A sampler adds the model's outputs of all steps (`objective`). Least squares from the sums of the linear's inputs
over the steps to the sums of what its outputs lack takes back what of the blocks' errors adds up and can be told from
those inputs, at no cost when the model runs. Errors of single steps would be the wrong target: to lessen those, a fit
shrinks the outputs, which adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.reports import OutputSearch

# Shares of each input's own power that are added to it. The best one is chosen on held-out trajectories.
RIDGES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
HELD_OUT = 4  # one trajectory in four judges: the last ones, which are of other images


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Of the sums over a trajectory's steps, added up over tokens: inputs with inputs (K, K) and with what the outputs
    lack (K, N), in float64; the powers of what they lack and of the outputs as they should be. With a bias, a further
    input of a fixed size stands for it."""

    inputs: Tensor
    missing: Tensor
    lost: float
    signal: float

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.inputs + other.inputs,
            self.missing + other.missing,
            self.lost + other.lost,
            self.signal + other.signal,
        )

    def left(self, change: Tensor) -> float:
        """Noise over signal of the outputs once `change` (K, N) times the inputs is added."""
        found = self.lost + float(((self.inputs @ change - 2 * self.missing) * change).sum())
        return max(found, 0.0) / max(self.signal, 1e-30)


def moments_of(inputs: Tensor, found: Tensor, exact: Tensor, *, constant: float | None) -> Moments:
    """Of one trajectory: the sums of its `inputs` (M, K), of the outputs there are and of those of the 16-bit model
    (M, N). `constant`: the size of the input that stands for the bias; None without one."""
    x = inputs.double()
    if constant is not None:
        x = torch.cat([x, x.new_full((len(x), 1), constant)], 1)
    wanted = exact.double()
    missing = wanted - found.double()
    return Moments(x.T @ x, x.T @ missing, float(missing.square().sum()), float(wanted.square().sum()))


def fitted(train: Moments | None, judge: Moments | None) -> tuple[Tensor | None, OutputSearch]:
    """What to add to the transposed weight (K, N), None where held-out trajectories say that nothing is gained, and
    what was seen of them. The ridge is chosen on `judge`; then both are fitted with it."""
    before = 0.0 if judge is None else judge.lost / max(judge.signal, 1e-30)
    if train is None or judge is None:
        return None, OutputSearch(before, before, None)
    errors = {ridge: judge.left(_solved(train, ridge)) for ridge in RIDGES}
    ridge = min(errors, key=errors.__getitem__)
    if not errors[ridge] < before:
        return None, OutputSearch(before, before, None)
    both = train + judge
    # as much is added as there was: with more to go by, a smaller share
    share = float(train.inputs.trace() / both.inputs.trace())
    return _solved(both, ridge * share), OutputSearch(before, errors[ridge], ridge)


def _solved(moments: Moments, ridge: float) -> Tensor:
    damped = moments.inputs.clone()
    powers = damped.diagonal()
    # of an input that is always 0 nothing is known
    powers.add_(ridge * powers + 1e-9 * powers.mean().clamp(min=1e-30))
    return torch.linalg.solve(damped, moments.missing)
