"""The calibration prompts that a recipe names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svdq_cli.calibration.prompt_files import PromptList, prompts_in
from svdq_cli.calibration.prompt_sets import find_prompt_set, prompts_of_set
from svdq_cli.calibration.prompts import choose_prompts, dataset_prompts
from svdq_cli.errors import UsageError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import (
    DatasetPrompts,
    Recipe,
    find_prompts,
    find_source,
)
from svdq_cli.records import (
    Event,
    Observer,
)
from svdq_cli.reports import (
    PromptFacts,
)
from svdq_cli.text import counted


@dataclass(frozen=True, slots=True)
class ChosenPrompts:
    """The prompts that a run uses, in their order, and where they come from."""

    texts: tuple[str, ...]
    facts: PromptFacts


def chosen_prompts(recipe: Recipe, options: RunOptions, observe: Observer) -> ChosenPrompts:
    """The prompts of a recipe whose settings are filled in (`with_model_sampling`). Read once per run and carried from
    there on (`Prepared.prompts`): a file may change, and a data set on the Hub takes its time. A note says what was
    read. UsageError for a recipe that names none."""
    wanted = recipe.calibration
    if wanted is None or wanted.prompts is None or wanted.samples is None:
        raise UsageError("the recipe names no calibration prompts", hint="give --prompts FILE")
    found = _prompt_list(wanted.prompts, options.beside)
    texts = choose_prompts(found.texts, samples=wanted.samples, seed=wanted.seed, observe=observe)
    facts = PromptFacts(found.origin, len(found.texts), len(texts))
    count = (
        counted(facts.used, "prompt")
        if facts.used == facts.available
        else f"{facts.used} of {counted(facts.available, 'prompt')}"
    )
    observe(Event("note", "prompts", detail=f"{count} from {facts.read_from}"))
    return ChosenPrompts(texts, facts)


def _prompt_list(wanted: str | DatasetPrompts, beside: Path | None) -> PromptList:
    if isinstance(wanted, str):
        if known := find_prompt_set(wanted):
            return PromptList(prompts_of_set(known), known.name)
        return prompts_in(find_prompts(wanted, beside))
    name, plain = wanted.dataset, wanted.config is None and wanted.split is None
    if plain and wanted.column is None and (known := find_prompt_set(name)):
        return PromptList(prompts_of_set(known), known.name)
    local = Path(find_source(name, beside)).expanduser()
    if plain and (local.exists() or local.suffix):
        return prompts_in(find_prompts(name, beside), column=wanted.column)
    found = dataset_prompts(name, config=wanted.config, split=wanted.split, column=wanted.column)
    return PromptList(found.texts, f"column {found.column} of {name}")
