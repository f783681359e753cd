"""What would stop a conversion, found before hours of work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdq_cli.recipe import (
    Recipe,
)
from svdq_cli.records import ignore_events

if TYPE_CHECKING:
    from svdq_cli.prepare.options import RunOptions
    from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.from_command_line import outputs_of


def require_convertible(recipe: Recipe, options: RunOptions) -> tuple[Path, ...]:
    """Refuses what a conversion would refuse before it reads a weight; returns its outputs. A model that has to be
    downloaded first is not looked at."""
    from svdq_cli.conversion.needs import needs_of, require_blocks_run, require_parts
    from svdq_cli.conversion.provenance import contents_before
    from svdq_cli.conversion.resume import require_new
    from svdq_cli.conversion.size_budget import require_search
    from svdq_cli.prepare.locate import hub_id
    from svdq_cli.prepare.prepare import prepare
    from svdq_cli.prepare.prompts import chosen_prompts

    paths = outputs_of(recipe)
    replaces = require_new(paths, options)
    if hub_id(recipe.model.source, beside=options.beside) is None:
        prepared = prepare(recipe, beside=options.beside)
        require_own_places(prepared, paths, None, overwrite=replaces)
        needs = needs_of(prepared, None)
        require_parts(prepared, needs)
        require_blocks_run(prepared, needs)
        require_search(prepared, needs, lambda: contents_before(prepared, options))
        if needs.prompts:
            chosen_prompts(prepared.recipe, options, ignore_events)
    return paths


def require_own_places(
    prepared: Prepared, paths: Sequence[Path], calibration: Path | None, *, overwrite: bool
) -> None:
    """UsageError for outputs that can't be written where they are to be. `paths`: one for each of the targets."""
    from svdq_cli.prepare.facts import inputs_of
    from svdq_cli.storage.output_paths import require_places

    require_places(
        paths,
        folders=[not target.format.single_file for target in prepared.targets],
        inputs=inputs_of(prepared, calibration),
        overwrite=overwrite,
    )
