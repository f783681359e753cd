"""What a conversion needs besides the weights, decided once: statistics, and images of the 16-bit model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svdq_cli.calibration.artefact import Calibration, open_calibration
from svdq_cli.errors import UsageError
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.recipe import Recipe
from svdq_cli.source.whole import require_whole


@dataclass(frozen=True, slots=True)
class DataFree:
    """No activations are seen: no smoothing, and layers are judged by their weights alone."""


@dataclass(frozen=True, slots=True)
class GivenStatistics:
    """Statistics of the activations that `svdq calibrate` has written."""

    artefact: Calibration


@dataclass(frozen=True, slots=True)
class OwnStatistics:
    """Statistics of the activations of images that the conversion generates first."""

    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Needs:
    """What a conversion is given or generates. `tuning` and `gains`: how images are sampled to tune on (effort
    best), to fit the last linear on (`output`), and to weigh layers by their effect on the image (a search for ranks);
    None where that is not done. `encoders`: whose prompts text encoders are rounded for; None where none become 4-bit,
    or no prompts are named."""

    statistics: DataFree | GivenStatistics | OwnStatistics
    tuning: Sampling | None
    output: Sampling | None
    gains: Sampling | None
    encoders: Sampling | None

    @property
    def data_free(self) -> bool:
        return isinstance(self.statistics, DataFree)

    @property
    def calibrates(self) -> Sampling | None:
        """How the images of its own statistics are sampled; None where it has no statistics of its own."""
        return self.statistics.sampling if isinstance(self.statistics, OwnStatistics) else None

    @property
    def images(self) -> Sampling | None:
        """How images are sampled, whatever they are needed for; None where none are."""
        return self.calibrates or self.tuning or self.output or self.gains

    @property
    def prompts(self) -> Sampling | None:
        """How the prompts that it reads are sampled; None where it reads none."""
        return self.images or self.encoders


def needs_of(prepared: Prepared, given: Calibration | None) -> Needs:
    """What the conversion of a recipe needs. `given`: of `given_statistics`. UsageError for curves without any."""
    sampling = prepared.sampling
    if given is not None:
        statistics = GivenStatistics(given)
    elif sampling is not None and prepared.recipe.quantization.effort != "datafree":
        statistics = OwnStatistics(sampling)
    elif prepared.recipe.modulation == "curve":
        raise UsageError(
            "modulation: curve needs to see the timesteps, but there is no calibration",
            hint="name prompts with --prompts or a recipe, give --calib, or write modulation: w4a16",
            where="modulation",
        )
    else:
        return Needs(DataFree(), tuning=None, output=None, gains=None, encoders=None)
    # Both run the whole pipeline on the recipe's prompts
    recorded = sampling if prepared.source.pipeline is not None else None
    return Needs(
        statistics,
        # what is tuned is mostly low-rank branches
        tuning=recorded if prepared.recipe.quantization.effort == "best" and prepared.plan.w4a4 else None,
        output=recorded if "output" in prepared.settings.steps and prepared.plan.w4a4 else None,
        gains=recorded if is_searched(prepared) else None,
        encoders=sampling if prepared.encoders else None,
    )


def given_statistics(recipe: Recipe, path: Path | None) -> Calibration | None:
    """The artefact of `--calib`, where the effort takes any."""
    return open_calibration(path) if path and recipe.quantization.effort != "datafree" else None


def is_searched(prepared: Prepared) -> bool:
    """Whether the recipe leaves ranks, bits of activations or 16-bit layers to a search."""
    wanted = prepared.recipe.quantization
    ranked = any(not plan.branchless for plan in prepared.plan.w4a4)
    return (wanted.rank == "auto" and ranked) or wanted.size_bytes is not None


def require_blocks_run(prepared: Prepared, needs: Needs) -> None:
    """UsageError where the recipe wants the model tuned and it can't be run later, before hours are spent on layers."""
    wanted = prepared.recipe.quantization.effort == "best" and not needs.data_free
    if wanted and prepared.plan.w4a4 and needs.tuning is None:
        raise UsageError(
            "effort best tunes the model, which needs the whole pipeline and prompts",
            hint="give a recipe with prompts and the pipeline (--prompts, --base), or use --effort balanced",
            where="quantization.effort",
        )


def require_parts(prepared: Prepared, needs: Needs) -> None:
    """InputError where a component of the pipeline that is copied into an output, or generated with, is missing or
    damaged."""
    pipeline = prepared.source.pipeline
    copied = not all(target.format.single_file for target in prepared.targets)
    if pipeline is not None and (copied or needs.prompts is not None):
        require_whole(pipeline, skip=prepared.source.components)
