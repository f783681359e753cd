"""The recipe: what comes out of a conversion, as one checked YAML file (`version: 1`).

This is the room's door; everything else in it is private to the room.
"""

from svdq_cli.recipe.gates import Gate, figure_of, parse_fail_if, parse_gate, section_of
from svdq_cli.recipe.overrides import with_overrides
from svdq_cli.recipe.paths import find_prompts, find_source, user_path
from svdq_cli.recipe.reading import at_its_rule, load_recipe, parse_recipe
from svdq_cli.recipe.schema import (
    DEFAULT_EFFORT,
    DEFAULT_RANK,
    LORA_HINT,
    Calibration,
    DatasetPrompts,
    GroupOverride,
    IncludeOverride,
    KeepOverride,
    LayerOverride,
    Lora,
    Model,
    Output,
    OutputFormat,
    Quantization,
    RankOverride,
    Recipe,
    SkipOverride,
    default_recipe,
    embedded,
    json_schema,
    lora_of,
    output_of,
    resolved,
)
from svdq_cli.recipe.shipped import (
    ShippedRecipe,
    copied_text,
    recipe_like,
    schema_address,
    shipped_recipe,
    shipped_recipes,
)
from svdq_cli.recipe.template import recipe_template
from svdq_cli.text import SIZE_HINT, bytes_of_size

__all__ = [
    "DEFAULT_EFFORT",
    "DEFAULT_RANK",
    "LORA_HINT",
    "SIZE_HINT",
    "Calibration",
    "DatasetPrompts",
    "Gate",
    "GroupOverride",
    "IncludeOverride",
    "KeepOverride",
    "LayerOverride",
    "Lora",
    "Model",
    "Output",
    "OutputFormat",
    "Quantization",
    "RankOverride",
    "Recipe",
    "ShippedRecipe",
    "SkipOverride",
    "at_its_rule",
    "bytes_of_size",
    "copied_text",
    "default_recipe",
    "embedded",
    "figure_of",
    "find_prompts",
    "find_source",
    "json_schema",
    "load_recipe",
    "lora_of",
    "output_of",
    "parse_fail_if",
    "parse_gate",
    "parse_recipe",
    "recipe_like",
    "recipe_template",
    "resolved",
    "schema_address",
    "section_of",
    "shipped_recipe",
    "shipped_recipes",
    "user_path",
    "with_overrides",
]
