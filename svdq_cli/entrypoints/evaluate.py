"""`svdq eval`: which recipe compares a checkpoint with a 16-bit model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svdq_cli.checkpoint.reader import NAME_AGAINST, open_checkpoint
from svdq_cli.entrypoints.generate import NO_INPUTS, Inputs, with_inputs
from svdq_cli.prepare.defaults import evaluation_recipe
from svdq_cli.prepare.from_command_line import override
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.sources import pipeline_of, without_same_base
from svdq_cli.recipe import Recipe


def recipe_against(
    checkpoint: Path,
    against: Recipe,
    given: Mapping[str, object],
    *,
    inputs: Inputs = NO_INPUTS,
    options: RunOptions,
) -> Recipe:
    """How `checkpoint` is compared with the model of `against`: on held-out prompts, sampled as the checkpoint says.

    `against` gives the model and the gates. `given` is put over what the checkpoint says, by the recipe's keys
    (`override`), `inputs` over the images that it reads.
    """
    against = without_same_base(against, options)
    opened = open_checkpoint(checkpoint, base=pipeline_of(against, options), hint=NAME_AGAINST)
    recipe = evaluation_recipe(opened, against.model.source)
    recipe = override(
        recipe.model_copy(update={"model": against.model, "gates": against.gates}),
        given,
    )
    return recipe if inputs == NO_INPUTS else with_inputs(recipe, inputs)
