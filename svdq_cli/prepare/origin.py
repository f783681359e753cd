"""Is a 16-bit model the one that a checkpoint was made from? Its digest says so, and so do those of LoRAs.

`svdq check` and `svdq eval` ask before they compare anything: a good checkpoint compared with another model, or with
its own model without the LoRA that was folded in, would otherwise look like a bad one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.read import adapter_file
from svdq_cli.checkpoint.check import first_difference, require_same_model
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.checkpoint.writer import report_path
from svdq_cli.errors import InputError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.sources import lora_files, pipeline_of, source_of
from svdq_cli.recipe import Lora, Recipe
from svdq_cli.source import Source, denoiser_components, file_sha256, only, source_digest
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.output_paths import REPORT_FILE

_MAX_REPORT = 64 << 20  # bytes of a report that is read


@dataclass(frozen=True, slots=True)
class NamedLora:
    """A LoRA that a checkpoint says it holds. `sha256`: of its file; None where that was not recorded."""

    name: str
    weight: float
    sha256: str | None
    component: str | None  # the denoiser that it changes; None where there is one, or the names in it tell
    how: Literal["merged before the conversion", "folded in after it"]

    @property
    def option(self) -> str:
        """How the command line names it."""
        return f"--lora {self}"

    def __str__(self) -> str:
        component = f":{self.component}" if self.component else ""
        return f"{self.name}:{self.weight:g}{component}"

    def is_at(self, path: str | Path) -> bool:
        """Whether a path ends in its name."""
        parts = PurePath(self.name).parts
        return PurePath(path).parts[-len(parts) :] == parts


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """A 16-bit model next to a checkpoint that claims to be made from one.

    `source`: the model with the LoRAs of the checkpoint merged, as far as they were given or found.
    `same`: whether that is what the checkpoint was made from, by its digest; None where the checkpoint records none.
    `found`: LoRAs that were not given, but whose files were found by their digests.
    `source_mismatch`, `hint`: why it is another model and what to do, for people; None where nothing speaks against it.
    `note`: what else to know of the comparison.
    `digest`: sha256 of `source` (`source_digest`), where it was computed.
    """

    source: Source
    same: bool | None
    found: tuple[NamedLora, ...] = ()
    source_mismatch: str | None = None
    hint: str | None = None
    note: str | None = None
    digest: str | None = None

    @property
    def loras(self) -> tuple[str, ...]:
        """The LoRAs in `found`, as the command line names them."""
        return tuple(map(str, self.found))

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say of the comparison before its figures; empty where there is nothing to say."""
        read = [f"{lora} was {lora.how}, so it is merged into the 16-bit model here" for lora in self.found]
        spoken = f"{self.source_mismatch}; {self.hint}" if self.source_mismatch else None
        return (*read, *(text for text in (spoken, self.note) if text))

    def require_same(self) -> Source:
        """The source. Raises InputError (kind "wrong-source") where it is another model."""
        if self.source_mismatch is None:
            return self.source
        raise InputError(
            self.source_mismatch, hint=self.hint, where=str(self.source.path), kind="wrong-source"
        )


def origin_of(checkpoint: Checkpoint, recipe: Recipe, options: RunOptions) -> Origin:
    """The recipe's model next to the checkpoint. Reads all of its weights once, for the digest.

    Raises InputError (kind "shape-mismatch") for a model whose layers are not those of the checkpoint.
    """
    recipe = _of_denoiser(recipe, checkpoint, options)
    given = _given(recipe, options)
    needed = named_loras(checkpoint)
    pairs = _matched(needed, given)
    for lora, index in pairs.items():
        if lora.component is not None:
            given[index] = given[index][0].model_copy(update={"component": lora.component}), given[index][1]
    missing = [lora for lora in needed if lora not in pairs]
    places = {lora: _find(lora, checkpoint, recipe, options) for lora in missing}
    found = [(lora, place) for lora, place in places.items() if place is not None]
    folded = {pairs[lora] for lora in pairs if lora.how.startswith("folded")}
    merged_first = [lora for index, (lora, _) in enumerate(given) if index not in folded]
    merged_first += [_lora(lora, place) for lora, place in found if not lora.how.startswith("folded")]
    since = [given[index][0] for index in sorted(folded)]
    since += [_lora(lora, place) for lora, place in found if lora.how.startswith("folded")]

    before = _as_converted(source_of(_with_loras(recipe, merged_first), options), checkpoint)
    source = before
    if since:
        loras = [*merged_first, *since]
        source = _as_converted(source_of(_with_loras(recipe, loras), options), checkpoint)
    require_same_model(checkpoint, source)
    names = tuple(lora for lora, _ in found)
    if lost := next((lora for lora, place in places.items() if place is None), None):
        if any(lost.is_at(lora.path) for lora, _ in given):
            return Origin(
                source,
                same=False,
                found=names,
                source_mismatch=f"{lost.name} is not the same file as the one that was {lost.how}",
                hint=f"give the file with sha256 {str(lost.sha256)[:12]}",
            )
        return Origin(
            source,
            same=False,
            found=names,
            source_mismatch=f"the checkpoint holds the LoRA {lost.name} (weight {lost.weight:g}, {lost.how}), "
            f"but {source.path} is compared without it",
            hint=f"add {lost.option}",
        )
    if wrong := next((lora for lora, index in pairs.items() if given[index][0].weight != lora.weight), None):
        return Origin(
            source,
            same=False,
            found=names,
            source_mismatch=f"{wrong.name} was {wrong.how} with weight {wrong.weight:g}, "
            f"but is given here with {given[pairs[wrong]][0].weight:g}",
            hint=f"give it as {wrong.option}",
        )
    extra = [lora.path for index, (lora, _) in enumerate(given) if index not in pairs.values()]
    return _judged(checkpoint, before, source, names, extra)


def _of_denoiser(recipe: Recipe, checkpoint: Checkpoint, options: RunOptions) -> Recipe:
    """The recipe for the denoiser that the checkpoint holds alone, where its pipeline has several:
    what LoRAs are merged into."""
    pipeline, component = pipeline_of(recipe, options), checkpoint.source.component
    known = denoiser_components(pipeline) if pipeline else ()
    if len(checkpoint.source.components) > 1 or len(known) < 2 or component not in known:
        return recipe
    model = recipe.model.model_copy(update={"denoiser": recipe.model.denoiser or component})
    return recipe.model_copy(update={"model": model})


def _as_converted(source: Source, checkpoint: Checkpoint) -> Source:
    """The denoisers of a source that the checkpoint holds; a file with one is taken for the checkpoint's."""
    components = checkpoint.source.components
    found = only(source, components)
    known = denoiser_components(source.pipeline) if source.pipeline else ()
    if len(found.components) == len(components) == 1 and components[0] in known:
        return replace(found, component=components[0])
    return found


def _judged(
    checkpoint: Checkpoint, before: Source, source: Source, found: tuple[NamedLora, ...], extra: Sequence[str]
) -> Origin:
    """Whether a source is the checkpoint's: by the digest; where that differs, by the weights. `before`: without the
    LoRAs that were folded in later."""
    recorded = (checkpoint.provenance or {}).get("source_sha256")
    if not isinstance(recorded, str):
        return Origin(source, same=None, found=found)
    digest = source_digest(before)
    known = digest if source is before else None
    if digest == recorded:
        return Origin(source, same=True, found=found, digest=known)
    # The same model as float32 and as bfloat16 has two digests. Its weights are the same to a rounding.
    differs = first_difference(checkpoint, source)
    if differs is None:
        note = f"{source.path} has, up to rounding, the weights that the checkpoint was made from, but another digest"
        return Origin(source, same=False, found=found, note=note, digest=known)
    other = f", and the checkpoint holds no LoRA {PurePath(extra[0]).name}" if extra else ""
    return Origin(
        source,
        same=False,
        found=found,
        source_mismatch=f"{source.path} is not the 16-bit model that the checkpoint was made from (sha256 "
        f"{digest[:12]}, not {recorded[:12]}; {differs} differs){other}",
        hint="leave the LoRA out"
        if extra
        else "give the model that the checkpoint was made from; svdq inspect shows its record",
        digest=known,
    )


# ------------------------------------------------------------------------------------------------- LoRAs


def held_already(checkpoint: Checkpoint, loras: Sequence[LoraFile]) -> tuple[str, ...]:
    """A sentence for every LoRA that the checkpoint says it holds already, by the sha256 of its file: used once more,
    the strengths add up."""
    named = named_loras(checkpoint)
    # the files are read only where something could be the same
    digests = [(lora, file_sha256(adapter_file(lora.path))) for lora in loras] if named else []
    return tuple(
        f"{held.name} is already in the checkpoint, at {held.weight:g}; with this one its strength is "
        f"{held.weight + lora.weight:g}"
        for lora, digest in digests
        for held in named
        if held.sha256 == digest and _same_denoiser(held.component, lora.component)
    )


def _given(recipe: Recipe, options: RunOptions) -> list[tuple[Lora, str]]:
    """The recipe's LoRAs with the sha256 of their files. Raises InputError for one that is missing."""
    return [
        (lora, file_sha256(adapter_file(file.path)))
        for lora, file in zip(recipe.model.loras, lora_files(recipe, options), strict=True)
    ]


def named_loras(checkpoint: Checkpoint) -> list[NamedLora]:
    """What the header says, which anybody may have written; of the denoisers that the checkpoint holds."""
    made = checkpoint.provenance or {}
    digests = made.get("loras_sha256")
    merged = [
        (name, weight, digests.get(name) if isinstance(digests, Mapping) else None, component)
        for name, weight, _, component in _entries(_section(made, "recipe", "model").get("loras"), "path")
    ]
    named = [
        *(NamedLora(*entry, "merged before the conversion") for entry in merged),
        *(NamedLora(*entry, "folded in after it") for entry in _entries(made.get("folded_loras"), "name")),
    ]
    return [lora for lora in named if lora.component in (None, *checkpoint.source.components)]


def _section(plain: Mapping[str, object], *keys: str) -> Mapping[str, object]:
    for key in keys:
        value = plain.get(key)
        if not isinstance(value, Mapping):
            return {}
        plain = value
    return plain


def _entries(listed: object, name_key: str) -> Iterator[tuple[str, float, str | None, str | None]]:
    """Name, weight, digest and denoiser of every LoRA."""
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, Mapping):
            name, weight = entry.get(name_key), entry.get("weight")
            if isinstance(name, str) and isinstance(weight, (int, float)):
                parts = [part for part in PurePath(name).parts[-2:] if part not in ("..", "/")]
                yield "/".join(parts), float(weight), _text(entry, "sha256"), _text(entry, "component")


def _text(entry: Mapping[object, object], key: str) -> str | None:
    value = entry.get(key)
    return value if isinstance(value, str) else None


def _matched(needed: Sequence[NamedLora], given: Sequence[tuple[Lora, str]]) -> dict[NamedLora, int]:
    """Pair the LoRAs that are needed with those given: by digest, else by name, and by denoiser where both say one."""
    pairs: dict[NamedLora, int] = {}
    for lora in needed:
        for index, (candidate, digest) in enumerate(given):
            same = digest == lora.sha256 if lora.sha256 else lora.is_at(candidate.path)
            same &= _same_denoiser(candidate.component, lora.component)
            if same and index not in pairs.values():
                pairs[lora] = index
                break
    return pairs


def _same_denoiser(one: str | None, other: str | None) -> bool:
    """Whether two LoRAs can be for one denoiser: not where both name one, and different ones."""
    return None in (one, other) or one == other


def _find(lora: NamedLora, checkpoint: Checkpoint, recipe: Recipe, options: RunOptions) -> Path | None:
    """The LoRA's file: where the checkpoint's report says, or next to the checkpoint, the model, or here."""
    if lora.sha256 is None:
        return None
    model = Path(recipe.model.source).expanduser()
    folders = [Path(), checkpoint.source.path.parent, model.parent, options.beside or Path()]
    for place in [*_reported_places(lora, checkpoint), *_below(folders, lora.name)]:
        if os.path.isfile(place) and file_sha256(place) == lora.sha256:
            return place
    return None


def _below(folders: Sequence[Path], name: str) -> Iterator[Path]:
    for folder in folders:
        yield folder / name
        yield folder / PurePath(name).name


def _reported_places(lora: NamedLora, checkpoint: Checkpoint) -> Iterator[Path]:
    """Paths of LoRAs in the report next to the checkpoint, written by `svdq lora` or by the conversion. That of a
    denoiser's folder is its pipeline's."""
    path = checkpoint.source.path
    for report in (report_path(path, checkpoint.format), path.parent / REPORT_FILE):
        if report.is_file() and report.stat().st_size <= _MAX_REPORT:
            with suppress(InputError):
                yield from _places_in(read_json(report), lora)


def _places_in(plain: Mapping[str, object], lora: NamedLora) -> Iterator[Path]:
    for listed in (plain.get("loras"), _section(plain, "recipe", "model").get("loras")):
        for entry in listed if isinstance(listed, list) else []:
            path = entry.get("path") if isinstance(entry, Mapping) else None
            if isinstance(path, str) and lora.is_at(path):
                yield Path(path)


def _lora(named: NamedLora, place: Path) -> Lora:
    return Lora(path=str(place.absolute()), weight=named.weight, component=named.component)


def _with_loras(recipe: Recipe, loras: Sequence[Lora]) -> Recipe:
    model = recipe.model.model_copy(update={"loras": tuple(loras)})
    return recipe.model_copy(update={"model": model})
