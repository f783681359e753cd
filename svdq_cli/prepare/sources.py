"""The 16-bit model that a recipe names, with its LoRAs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.errors import UsageError
from svdq_cli.prepare.locate import locate_base, locate_file, locate_source
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import (
    Recipe,
)
from svdq_cli.source import Source, denoiser_components, named_denoiser, only, open_source
from svdq_cli.storage.pipeline_index import is_pipeline


def source_of(recipe: Recipe, options: RunOptions) -> Source:
    """The 16-bit model that a recipe names."""
    wanted = recipe.model
    base = locate_base(wanted.base, beside=options.beside) if wanted.base else None
    path = locate_source(wanted.source, beside=options.beside, revision=wanted.revision)
    source = _with_denoiser(open_source(path, base=base), wanted.denoiser)
    return merge_loras(source, lora_files(recipe, options))


def with_denoisers_of_loras(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with the denoiser of each of its LoRAs, as the source has them merged (`source_of`): another file name
    would no longer tell it."""
    if not any(source.merged_into):
        return recipe
    loras = tuple(
        lora.model_copy(update={"component": component})
        for lora, component in zip(recipe.model.loras, source.merged_into, strict=True)
    )
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"loras": loras})})


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
    told = named_denoiser(known, source.path.stem) or known[0]
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


def lora_files(recipe: Recipe, options: RunOptions) -> tuple[LoraFile, ...]:
    """The LoRAs that a recipe merges: files, or folders of peft's."""
    return tuple(
        LoraFile(locate_file(lora.path, beside=options.beside), lora.weight, lora.component)
        for lora in recipe.model.loras
    )
