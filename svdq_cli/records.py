"""The pipeline in nouns: every record that flows from a recipe to a checkpoint and its reports.

Letters used everywhere, here and in the kernels: M tokens, K in features, N out features, R rank, G group size.
Records that hold tensors compare by identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor, dtype

# ---------------------------------------------------------------------------------------------------- precision


@dataclass(frozen=True, slots=True)
class Int4:
    """Signed 4-bit integers, one 16-bit scale per (row, 64 inputs): weights in [-8, 7], activations in [-7, 7]."""

    name: ClassVar[Literal["int4"]] = "int4"
    group: ClassVar[int] = 64


@dataclass(frozen=True, slots=True)
class NvFp4:
    """E2M1 floats, one e4m3 micro scale per (row, 16 inputs) and one 16-bit outer scale per tensor."""

    name: ClassVar[Literal["nvfp4"]] = "nvfp4"
    group: ClassVar[int] = 16


Precision = Int4 | NvFp4

# What int4 runtimes add to a plain GELU's output, whose least value is -0.17, to quantize it without a sign. Exact in
# bfloat16; fixed in Nunchaku's fused kernel and in comfy-kitchen's op.
GELU_SHIFT = 0.171875

# What the 16 codes of a weight with 8-bit activations represent, as shares of its group's scale: the Lloyd-Max levels
# of 16 normal numbers over the largest of them, which is what a rotation makes of any weight.
_POSITIVE = (0.0532, 0.1605, 0.2707, 0.3861, 0.5096, 0.6455, 0.7998, 0.9817)
LEVELS = (*(-level for level in reversed(_POSITIVE)), *_POSITIVE)


def reciprocal(smooth: Tensor) -> Tensor:
    """1 / smooth in its own dtype, by which runtimes without a branch multiply inputs. Of any shape."""
    return (1 / smooth.float()).to(smooth.dtype)


MAX_SEED = 2**64 - 1  # the largest that torch's generators take


def following_seed(seed: int, distance: int) -> int:
    """The seed a given number of steps after another one; 0 follows MAX_SEED."""
    return (seed + distance) % (MAX_SEED + 1)


Effort = Literal["datafree", "fast", "balanced", "best"]
Smoothing = Literal["none", "closed-form", "grid"]
# Beyond the paper, in the order in which they are taken; `scales` is part of gptq: it searches every group's scale.
# `means` comes before all layers, `output` after them.
SearchStep = Literal["means", "learned", "refine", "gptq", "scales", "refit", "output"]

# ---------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of the source model, by its full module path.

    A 1x1 convolution is one too, over channels: `in_features` are its input channels, its weight is (N, K, 1, 1).
    """

    name: str
    in_features: int
    out_features: int
    bias: bool
    kind: Literal["linear", "conv1x1"] = "linear"


@dataclass(frozen=True, slots=True)
class W4A4Plan:
    """A linear that becomes 4-bit weights and activations plus a 16-bit low-rank branch.

    Rank 0: no branch. Runtimes without one multiply inputs by 1 / smooth, which 16 bits then hold exactly, and store
    layers of one input as one matrix, so that nvfp4 layers of an input share one outer scale.
    `curve`: its input depends on the timestep alone, so it runs along a curve that spans few directions; the branch
    holds all of the layer and the codes are zero.
    """

    linear: Linear
    precision: Precision
    rank: int
    curve: bool = False

    @property
    def name(self) -> str:
        return self.linear.name

    @property
    def alone(self) -> bool:
        """Whether nothing ties it to the other layers that read its input."""
        return self.curve

    @property
    def branchless(self) -> bool:
        """Whether it has no low-rank branch."""
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class W4A16Plan:
    """A linear whose weights become 4 bits (group 64, unsigned codes with a zero point); activations stay 16-bit."""

    linear: Linear
    group: ClassVar[int] = 64
    alone: ClassVar[bool] = True  # nothing ties it to the other layers that read its input

    @property
    def name(self) -> str:
        return self.linear.name


@dataclass(frozen=True, slots=True)
class RotatedPlan:
    """A linear whose inputs are rotated before they are quantized (ConvRot): 4-bit weights, no low-rank branch.

    Every `rotation` inputs side by side are multiplied by a Hadamard matrix, which spreads what single channels hold.
    """

    linear: Linear
    rotation: int  # 256, 64 or 16; divides K
    activation_bits: Literal[4, 8] = 4
    group: ClassVar[int] = (
        16  # of the weight's scales, with 8-bit activations; with 4-bit ones they are by row
    )
    alone: ClassVar[bool] = False
    # of the matrix, each four times the next: the largest that divides K is the best
    rotations: ClassVar[tuple[int, ...]] = (256, 64, 16)

    @classmethod
    def of(cls, linear: Linear, activation_bits: Literal[4, 8] = 4) -> RotatedPlan:
        """With the largest rotation that divides its inputs; 1, which rotates nothing, where none does."""
        fits = (size for size in cls.rotations if linear.in_features % size == 0)
        return cls(linear, next(fits, 1), activation_bits)

    @property
    def name(self) -> str:
        return self.linear.name


LayerPlan = W4A4Plan | W4A16Plan | RotatedPlan
# How a format's runtime keeps outliers from 4-bit numbers: a smoothing factor and a 16-bit branch, a rotation, or a
# smoothing factor alone.
Scheme = Literal["branch", "rotation", "smoothing"]


@dataclass(frozen=True, slots=True)
class SharedInput:
    """Layers that read the same activation: they are calibrated once and share one smoothing factor.

    `branches` partitions `layers`; the layers of one part also share one low-rank down projection (a fused
    q, k, v of some runtimes), so that a fused and a split checkpoint hold the same numbers.
    """

    name: str
    layers: tuple[str, ...]
    branches: tuple[tuple[str, ...], ...]

    def members(self, plans: Iterable[W4A4Plan]) -> tuple[tuple[W4A4Plan, ...], ...]:
        """Those of `plans` that are in each branch; branches without any are left out."""
        by_name = {plan.name: plan for plan in plans}
        found = (tuple(by_name[name] for name in part if name in by_name) for part in self.branches)
        return tuple(part for part in found if part)


# Without slots: `by_name` is kept in the instance
@dataclass(frozen=True)
class ModelPlan:
    """What becomes of every linear of one model. Every linear is in exactly one of `layers` and `kept`."""

    family: str
    model_class: str
    # the pipeline's folders that hold it: "transformer" or "unet", and others' next to it
    components: tuple[str, ...]
    parameters: int
    layers: tuple[LayerPlan, ...]
    kept: tuple[Linear, ...]
    inputs: tuple[SharedInput, ...]  # cover all of `layers`
    # of some kept layers: why, by name
    kept_because: Mapping[str, str] = field(default_factory=dict[str, str])
    by_names: bool = False  # names alone tell the roles: no family file does, and no forward pass showed them

    @property
    def w4a4(self) -> tuple[W4A4Plan, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, W4A4Plan))

    @property
    def w4a16(self) -> tuple[W4A16Plan, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, W4A16Plan))

    @property
    def rotated(self) -> tuple[RotatedPlan, ...]:
        return tuple(layer for layer in self.layers if isinstance(layer, RotatedPlan))

    def with_own_branches(self) -> ModelPlan:
        """The plan in which no layers share a down projection."""
        inputs = (
            replace(shared, branches=tuple((name,) for name in shared.layers)) for shared in self.inputs
        )
        return replace(self, inputs=tuple(inputs))

    def with_whole_inputs(self) -> ModelPlan:
        """The plan in which all layers of an input are solved together, data-free too: they may be one matrix."""
        return replace(
            self, inputs=tuple(replace(shared, branches=(shared.layers,)) for shared in self.inputs)
        )

    def layer_groups(self, *, data_free: bool) -> tuple[SharedInput, ...]:
        """What is solved, and in memory, at a time, in the order of `inputs`: of each the W4A4 layers together, because
        they share a smoothing factor, or the rotated ones, and every W4A16 layer and curve alone (the modulations of
        all blocks read one input).
        Data-free, where there is no smoothing, every branch alone. A layer group has its input's name; its first
        layer's is its own."""
        alone = {layer.name for layer in self.layers if layer.alone}
        found: list[SharedInput] = []
        for shared in self.inputs:
            kept = (tuple(name for name in part if name not in alone) for part in shared.branches)
            branches = tuple(part for part in kept if part)
            if data_free:
                found += (SharedInput(shared.name, part, (part,)) for part in branches)
            elif branches:
                together = tuple(name for name in shared.layers if name not in alone)
                found.append(SharedInput(shared.name, together, branches))
            found += (
                SharedInput(shared.name, (name,), ((name,),)) for name in shared.layers if name in alone
            )
        return tuple(found)

    @cached_property
    def by_name(self) -> Mapping[str, LayerPlan]:
        """The quantized layers by their names, in the order of `layers`."""
        return {layer.name: layer for layer in self.layers}


# ---------------------------------------------------------------------------------------------------- calibration

# One row in eight judges the steps of the search: the last ones, which come from images that the others do not
HELD_OUT = 8


@dataclass(frozen=True, slots=True, eq=False)
class InputCovariance:
    """Mean and covariance of an input over more tokens than it has rows. None of them is of an image whose rows judge
    the steps of the search."""

    mean: Tensor  # (K,) float32
    deviation: Tensor  # (K,) float32, each channel's standard deviation
    correlations: Tensor  # (K (K - 1) / 2,) float16: above the diagonal, row after row
    tokens: int

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for each in (self.mean, self.deviation, self.correlations))


@dataclass(frozen=True, slots=True, eq=False)
class ActivationStats:
    """What calibration keeps of one shared input, over all prompts, seeds and timesteps."""

    name: str
    abs_max: Tensor  # (K,) float32, per channel
    second_moment: Tensor  # (K,) float32, mean of x squared per channel
    rows: Tensor  # (M, K) bfloat16, a sample spread evenly over prompts, timesteps and tokens
    tokens_seen: int
    # the largest number in the output of each layer that reads the input; empty where it was not measured
    output_peaks: Mapping[str, float] = field(default_factory=dict[str, float])
    mean: Tensor | None = None  # (K,) float32: what all of these numbers are less than the 16-bit model's
    # (T, K) bfloat16: what the input is at T timesteps spread over all; None where it does not depend on time alone
    over_time: Tensor | None = None
    covariance: InputCovariance | None = None  # where rows are few for the number of channels


# ---------------------------------------------------------------------------------------------------- solutions


@dataclass(frozen=True, slots=True, eq=False)
class W4A4Solution:
    """One linear as low rank plus 4 bits: y = qa(x / smooth) . (codes * scales * outer)^T + (x down^T) up^T + bias.

    All floating tensors are in the dtype in which they are stored, so that decode(encode(s)) is s, bit for bit.
    """

    plan: W4A4Plan
    smooth: Tensor  # (K,)     16-bit; the activation is divided by this
    down: Tensor  # (R, K)     16-bit; applied to the raw activation
    up: Tensor  # (N, R)       16-bit
    codes: Tensor  # (N, K)    int8: int4 in [-8, 7], nvfp4 e2m1 nibbles 0..15
    scales: Tensor  # (N, K/G) int4: 16-bit, nvfp4: float8_e4m3fn
    outer: Tensor | None  # nvfp4: (1,) or (N,) 16-bit; int4: None
    bias: Tensor | None  # (N,) 16-bit


@dataclass(frozen=True, slots=True, eq=False)
class W4A16Solution:
    """One linear with 4-bit weights only: W = codes * scales + zeros (per row and 64 inputs)."""

    plan: W4A16Plan
    codes: Tensor  # (N, K)     uint8 0..15
    scales: Tensor  # (N, K/64) 16-bit
    zeros: Tensor  # (N, K/64)  16-bit, additive, already scaled
    bias: Tensor | None  # (N,) 16-bit


@dataclass(frozen=True, slots=True, eq=False)
class RotatedSolution:
    """One linear in rotated coordinates: y = qa(x H) . (values(codes) * scales)^T + bias.

    H is block-diagonal, of normalized regular Hadamard matrices. 4-bit activations: the values are the codes, and
    `scales` are all there is. 8-bit activations: round(LEVELS[code] * scale), an 8-bit integer, times `row_scales`.
    """

    plan: RotatedPlan
    codes: Tensor  # (N, K) int8: -7..7, or an index 0..15 into `LEVELS`
    scales: Tensor  # (N, 1) float32, or (N, K/16) float8_e4m3fn
    row_scales: Tensor | None  # (N,) float32 with 8-bit activations
    bias: Tensor | None  # (N,) 16-bit


LayerSolution = W4A4Solution | W4A16Solution | RotatedSolution


@dataclass(frozen=True, slots=True)
class SolveSettings:
    """How the search is made. Part of the fingerprint: it changes the bytes."""

    smoothing: Smoothing
    seed: int
    dtype: dtype  # the 16-bit dtype of everything that is stored unquantized
    steps: tuple[SearchStep, ...] = ()  # taken after the smoothing search, where there are calibration rows
    refinements: int = 5  # rounds of branch and codes that are fitted to each other, at most


@dataclass(frozen=True, slots=True)
class LayerSearch:
    """How a layer's solution was found; each field is a key of the JSON reports.

    `steps_db`: SQNR on held-out rows at the start (the paper's search) and after each step that was tried; a step that
    did not raise it over all layers of the input was not taken. Seconds are those of all layers of the shared input.
    `covariance_tokens`: of how many tokens GPTQ knew the covariance, 0 where it had the calibration rows alone.
    """

    rank: int | None
    smoothing: str | None  # "grid a=0.50 b=0.25", None for W4A16
    steps_db: Mapping[str, float]
    steps_seconds: Mapping[str, float]
    steps_taken: tuple[str, ...]
    fallback: tuple[str, ...]  # why steps could not be tried
    device: str  # where it was solved: "cpu" or "cuda", which differ in the lowest bits
    covariance_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How well a solved layer reproduces the 16-bit layer's output on the calibration rows (or, without any, on its
    weight), and how the solution was found."""

    name: str
    sqnr_db: float
    # Frobenius norm of the rebuilt weight's error over the weight's, in smoothed coordinates
    weight_error: float
    search: LayerSearch


# ---------------------------------------------------------------------------------------------------- progress


@dataclass(frozen=True, slots=True)
class Event:
    """One step of progress. `done`/`total` count the stage's units (prompts, layers, images). A note and a warning are
    sentences, in `detail`."""

    kind: Literal["start", "advance", "end", "note", "warning"]
    stage: str
    done: int = 0
    total: int = 0
    detail: str = ""
    seconds: float | None = None
    job: str = ""  # which of several conversions; empty for the only one


Observer = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """The observer of callers that do not care."""
