"""The recipe of an evaluation, from a checkpoint alone."""

from __future__ import annotations

from collections.abc import Mapping

from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.recipe import Calibration, Recipe, default_recipe
from svdq_cli.records import following_seed

EVALUATION_SAMPLES = 16
SEED_DISTANCE = 1000  # from the seeds of calibration


def evaluation_recipe(checkpoint: Checkpoint, source: str) -> Recipe:
    """How a checkpoint is judged by default: sampled as it was calibrated or, where it was not, as its model is; on
    prompts that calibration has not seen (left open: `with_model_sampling` fills them in)."""
    made_with = (checkpoint.provenance or {}).get("recipe")
    known = Recipe.model_validate(made_with) if isinstance(made_with, Mapping) else default_recipe(source)
    base = known.calibration or Calibration()
    update = {
        "prompts": None,
        "samples": EVALUATION_SAMPLES,
        "seed": following_seed(base.seed, SEED_DISTANCE),
    }
    return known.model_copy(
        update={
            "model": known.model.model_copy(update={"source": source}),
            "calibration": base.model_copy(update=update),
        }
    )
