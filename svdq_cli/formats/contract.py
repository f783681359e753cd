"""What an output format promises, and what the numbers in every one of them mean.

A solved layer is the same in all formats; they differ in where its bits are. With N outputs, K inputs, rank R and
groups of G inputs (64 for int4, 16 for nvfp4), for a row x of the activation:

    y = (q(x / smooth) · (codes · scales)ᵀ) · outer + (x · downᵀ) · upᵀ + bias

| operand | shape | int4 | nvfp4 |
|---|---|---|---|
| codes | (N, K) | -8..7 | e2m1: 0, ½, 1, 1½, 2, 3, 4, 6 and a sign |
| scales | (N, K/G) | 16-bit, of either sign | float8 e4m3, positive |
| outer | (1,) or (N,) | none | 16-bit |
| smooth | (K,) | 16-bit, nonzero | 16-bit, nonzero |
| down, up | (R, K), (N, R) | 16-bit | 16-bit |
| bias | (N,) | 16-bit, or none | 16-bit, or none |

q quantizes each group of a row by its largest magnitude m: int4 to -7..7 with the scale m / 7 in 16 bits (to 0..15 with
m / 15, after adding `GELU_SHIFT`, where `LayoutTraits.unsigned`), nvfp4 to e2m1 with m / 6 in e4m3. The branch reads x
itself, not x / smooth. 16-bit is the checkpoint's dtype, bfloat16 or float16, everywhere in a file.

A W4A16 layer quantizes weights only: W = codes · scales + zeros, codes 0..15 (N, K), scales and zeros (N, K/64) 16-bit.

A layer of rank 0 has no branch, and smooth is exact as 1 / (1 / smooth) in 16 bits.

A rotated layer has no branch: y = q(x H) · Wᵀ + bias, H block-diagonal of Hadamard matrices (`solve.rotation`). q has
one float32 scale a row of x. With 4-bit activations it is m / 7, and W = codes · scales, codes -7..7, one float32 scale
a row; with 8-bit ones it is m / 127, and W = round(level · scale) · row scale, 16 levels, one e4m3 scale per 16 inputs.

`records.W4A4Solution` and `records.W4A16Solution` hold these operands, `solve.quantizers` quantizes to them,
`runtime.linear` computes the formula, `pack` knows the bit layouts. docs/formats/README.md has the same table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from svdq_cli.families.layouts.layout import ModelLayout
from svdq_cli.records import (
    LayerPlan,
    LayerSolution,
    ModelPlan,
    Precision,
    RotatedPlan,
    Scheme,
    W4A4Plan,
)
from svdq_cli.storage.tensor_file import TensorSpec


@dataclass(frozen=True, slots=True)
class PackedFacts:
    """What a checkpoint's metadata says about its quantized layers; their sizes are in the tensors."""

    w4a4: tuple[str, ...]
    w4a16: tuple[str, ...]
    precision: Precision | None  # None without W4A4 layers, and so is the rank
    rank: int | None
    dtype: torch.dtype | None  # of everything that is stored in 16 bits; None where only the tensors say it


@dataclass(frozen=True, slots=True)
class LayoutTraits:
    """What a runtime wants of one stored module beyond the sizes in its plan."""

    row_scales: bool = False  # nvfp4: an outer scale per row instead of one per tensor
    unsigned: bool = False  # int4: the runtime adds GELU_SHIFT to the activation and quantizes it to 0..15
    engine_names: bool = False  # the C++ engine's spelling of tensor names


PLAIN = LayoutTraits()


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The low-rank branch of a layer, or of a stored module: (x down^T) up^T."""

    down: Tensor  # (R, K) 16-bit
    up: Tensor  # (N, R) 16-bit

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class Format(ABC):
    """One file layout that some runtime loads: the bits of one stored module, and what the file says about itself.

    A stored module is a layer of the model, or several stacked by the family's layout (`checkpoint.match_layout`).
    Tensors are named by the suffix of their key, such as "qweight".
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[Precision, ...]]
    # One .safetensors, whose header holds the metadata; else a component folder.
    single_file: ClassVar[bool] = True
    # Modules are those of diffusers, so that no family needs a layout.
    own_names: ClassVar[bool] = False
    # Modules are those of the models' original checkpoints (`source.original_names`), so that no family needs a layout.
    original_names: ClassVar[bool] = False
    # A layer that the format or the plan leaves at 16 bits has a place among quantized ones.
    mixes: ClassVar[bool] = True
    # int4 modules fed by a plain GELU read unsigned activations.
    unsigned_after_gelu: ClassVar[bool] = False
    # Any linear may be a W4A4 module, a modulation too, which can so be a curve.
    curves: ClassVar[bool] = False
    # The file says one rank for all W4A4 modules.
    one_rank: ClassVar[bool] = True

    # ------------------------------------------------------------------------------------------- one stored module

    @abstractmethod
    def unsupported_reason(self, layer: LayerPlan) -> str | None:
        """Why the format can't hold this module ("out_features 200 is not a multiple of 128"), or None."""

    def scheme_of(self, precision: Precision) -> Scheme:
        """How its runtime keeps outliers from 4-bit numbers of that format."""
        return "branch"

    @property
    def has_branch(self) -> bool:
        """Whether its layers have a low-rank branch."""
        return all(self.scheme_of(precision) == "branch" for precision in self.precisions)

    def scheme_reason(self, layer: LayerPlan) -> str | None:
        """Why a layer is none of this format's schemes, or None."""
        match layer:
            case RotatedPlan():
                rotates = any(self.scheme_of(precision) == "rotation" for precision in self.precisions)
                return None if rotates else f"{self.name} has no rotated layers"
            case W4A4Plan(precision=precision) if not self.has_branch:
                if layer.branchless and self.scheme_of(precision) == "smoothing":
                    return None
                return f"{self.name} has no low-rank branch"
            case _:
                return None

    @abstractmethod
    def tensor_specs(
        self, layer: LayerPlan, dtype: torch.dtype, traits: LayoutTraits = PLAIN
    ) -> dict[str, TensorSpec]:
        """The exact key set of a module with shapes and dtypes, by suffix; `dtype` is that of what stays 16-bit."""

    @abstractmethod
    def encode(self, solution: LayerSolution, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        """One module as its stored tensors. ValueError where it does not fit or contradicts its plan."""

    @abstractmethod
    def decode(
        self, layer: LayerPlan, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN
    ) -> LayerSolution:
        """The inverse of `encode`, bit for bit. InputError, with module and tensor, for anything but the exact
        tensors."""

    @abstractmethod
    def encode_branch(self, branch: Branch, traits: LayoutTraits = PLAIN) -> dict[str, Tensor]:
        """The branch of a W4A4 module, in the stored order of its rows: two of its tensors."""

    @abstractmethod
    def decode_branch(self, tensors: Mapping[str, Tensor], traits: LayoutTraits = PLAIN) -> Branch:
        """The inverse of `encode_branch`; `tensors` may hold others of the module too."""

    # ------------------------------------------------------------------------------------------- the file as a whole

    @abstractmethod
    def metadata(self, plan: ModelPlan, dtype: torch.dtype) -> dict[str, object]:
        """What tells the runtime what is quantized: the `quantization_config` object, or the header's metadata.

        The plan is that of the file: its layers are stored modules. UsageError where the format can't hold it.
        """

    def warnings(self, plan: ModelPlan) -> tuple[str, ...]:
        """What a user is to know of a file of these stored modules before it is made."""
        return ()

    def naming(self, name: str, family: str, precision: str, rank: int) -> str | None:
        """What a user is to know where a runtime reads something from a file's name, and `name` does not say it."""
        return None

    def model_metadata(self, layout: ModelLayout | None, config: Mapping[str, object]) -> dict[str, object]:
        """What the runtime builds the model from beyond its diffusers config; for most of them nothing."""
        return {}

    # Reading back, in two steps, neither of which reads a weight.

    @abstractmethod
    def parse_metadata(self, config: Mapping[str, object]) -> PackedFacts:
        """The inverse of `metadata`. InputError that names the key where it says nothing clear."""

    @abstractmethod
    def layer_plans(self, facts: PackedFacts, specs: Mapping[str, TensorSpec]) -> tuple[LayerPlan, ...]:
        """The stored modules of a file; `specs` of all its tensors by full name. InputError."""

    @abstractmethod
    def recognizes(self, path: Path) -> bool:
        """Whether a path holds a checkpoint of this format. Never raises for what is merely something else."""

    def implied_metadata(self, specs: Mapping[str, TensorSpec]) -> dict[str, object] | None:
        """What the header of a single file with these tensors would say of the packing; None for other files.

        For files that lost their header: see `formats.implied`."""
        return None
