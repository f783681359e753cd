"""The 16-bit model that a recipe names, with its LoRAs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from svdq_cli.adapters.merge import merge_loras
from svdq_cli.errors import UsageError
from svdq_cli.prepare.locate import locate_base, locate_file, locate_source
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import (
    Recipe,
)
from svdq_cli.source import Source, denoiser_components, only, open_source
from svdq_cli.storage.pipeline_index import is_pipeline

# What Wan's own files and ComfyUI's call the second transformer of Wan 2.2.
_LOW_NOISE = re.compile("low[-_ ]?noise", re.IGNORECASE)


def source_of(recipe: Recipe, options: RunOptions) -> Source:
    """The 16-bit model that a recipe names."""
    wanted = recipe.model
    base = locate_base(wanted.base, beside=options.beside) if wanted.base else None
    path = locate_source(wanted.source, beside=options.beside, revision=wanted.revision)
    weights = (lora.weight for lora in wanted.loras)
    adapters = list(zip(lora_files(recipe, options), weights, strict=True))
    return merge_loras(_with_denoiser(open_source(path, base=base), wanted.denoiser), adapters)


def without_same_base(recipe: Recipe, options: RunOptions) -> Recipe:
    """A recipe whose base is its own source, a whole pipeline, without the base: next to a checkpoint people name the
    pipeline as both."""
    model = recipe.model
    if not model.base or model.revision:
        return recipe
    same = model.base == model.source or (
        locate_base(model.base, beside=options.beside).resolve()
        == locate_source(model.source, beside=options.beside).resolve()
    )
    if not same:
        return recipe
    return recipe.model_copy(update={"model": model.model_copy(update={"base": None})})


def _with_denoiser(source: Source, wanted: str | None) -> Source:
    """The source with the denoiser that a recipe names alone. A file with one of a pipeline's is taken for the one that
    its name tells, or for the first, which is said."""
    known = denoiser_components(source.pipeline) if source.pipeline else (source.component,)
    if wanted is not None:
        if wanted not in known:
            raise UsageError(
                f"{source.pipeline or source.path} has no denoiser {wanted!r}",
                hint=f"it has {', '.join(known)}",
                where="model.denoiser",
            )
        return only(source, [wanted]) if source.further else replace(source, component=wanted)
    if source.pipeline == source.path or source.path.name in known or len(known) == 1 or source.further:
        return source
    told = known[1] if _LOW_NOISE.search(source.path.stem) else known[0]
    others = [name for name in known if name != told]
    said = (
        f"{source.path} holds one of the {len(known)} denoisers of {source.pipeline}, taken to be {told}; if it "
        f"is {' or '.join(others)}, add --denoiser {others[0]}"
    )
    return replace(source, component=told, warnings=(*source.warnings, said))


def pipeline_of(recipe: Recipe, options: RunOptions) -> Path | None:
    """The pipeline folder of the 16-bit model that a recipe names: its base or, where that is one, its source."""
    if recipe.model.base:
        return locate_base(recipe.model.base, beside=options.beside)
    path = locate_source(recipe.model.source, beside=options.beside, revision=recipe.model.revision)
    return path if is_pipeline(path) else None


def lora_files(recipe: Recipe, options: RunOptions) -> tuple[Path, ...]:
    """The LoRAs that a recipe merges: files, or folders of peft's."""
    return tuple(locate_file(lora.path, beside=options.beside) for lora in recipe.model.loras)
