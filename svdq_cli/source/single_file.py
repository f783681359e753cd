"""One file with a whole model: original, ComfyUI or diffusers names, 16 or 8 bits, alone or with text encoders.

The file is read by its header: which part of it is the diffusion model, what its tensors are called in diffusers, and
what config they belong to. The weights stay on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from svdq_cli.errors import InputError
from svdq_cli.source.classes import shapes_of
from svdq_cli.source.companion_names import PREFIXES
from svdq_cli.source.companions import companions_in
from svdq_cli.source.configs import (
    KNOWN_CLASSES,
    KnownClass,
    class_of_names,
    known_class,
    published_config,
)
from svdq_cli.source.folders import component_config, header_of_files, pipeline_index, quantized_component
from svdq_cli.source.library_names import convert_by_library, published_pipeline
from svdq_cli.source.markers import SCALED_MARKER, Told, told_by, without_markers
from svdq_cli.source.model import ConfigFrom, Source
from svdq_cli.source.names import Naming, convert_names
from svdq_cli.source.original_names import NAMINGS, NAMINGS_WITH_BASE, naming_of
from svdq_cli.source.other_files import refuse_other_files
from svdq_cli.source.prediction import prediction_warnings
from svdq_cli.source.prefixes import find_model
from svdq_cli.source.tensors import TensorEntry
from svdq_cli.source.upconverted import Reading, upconverted, with_promised_scales
from svdq_cli.text import counted

_DIFFUSERS_NAMES = "diffusers names"
BASE_HINT = "name a diffusers pipeline of the same model: --base FOLDER_OR_HUB_ID (recipe: model.base)"
_SIGNATURES = tuple(model.signature for model in (*NAMINGS, *KNOWN_CLASSES, *NAMINGS_WITH_BASE))

Entry = TypeVar("Entry", bound=TensorEntry)


@dataclass(frozen=True, slots=True)
class _Model:
    """The diffusion model inside a file, under its own names without their prefix."""

    tensors: Mapping[str, TensorEntry]
    naming: Naming | None  # None: diffusers names
    known: KnownClass | None  # None: the base says what class it is


def has_original_names(names: Collection[str]) -> bool:
    """Whether these are the names of an original checkpoint that svdq has a table for."""
    present = set(names)
    return any(naming.signature <= present for naming in (*NAMINGS, *NAMINGS_WITH_BASE))


def open_single_file(path: Path, *, base: Path | None = None, files: Sequence[Path] = ()) -> Source:
    """Index a single `.safetensors` file, or the shards `files` of one. `base`: a pipeline folder with the parts that
    the file lacks.

    Raises InputError: damaged, already quantized, not a known model, or not the base's model.
    """
    header = header_of_files(files or (path,))
    kind = f"{len(files)} shards" if len(files) > 1 else "single file"
    return source_of_file(path, header.tensors, upconverted, base=base, metadata=header.metadata, kind=kind)


def source_of_file(
    path: Path,
    stored: Mapping[str, Entry],
    reading: Reading[Entry],
    *,
    base: Path | None,
    metadata: Mapping[str, str] = MappingProxyType({}),
    kind: str = "single file",
) -> Source:
    """A source from everything that a file holds, under whatever names. `reading` brings stored tensors to 16 bits."""
    part = find_model(stored, _SIGNATURES, lambda: _base_names(base), PREFIXES)
    naming, known = _recognized(part.tensors, base)
    model_class = known.model_class if known else _base_class(base)
    weights, inside = without_markers(part.tensors, model_class)
    beside, on_top = without_markers(part.rest, model_class)
    markers = {**on_top, **inside}
    told = told_by(markers, metadata, model_class)
    read = reading(path, weights)
    if SCALED_MARKER in markers:
        read = with_promised_scales(path, read)
    if known is None:
        _require_known_to_base(path, part.tensors, stored, base)
    tensors, names = _diffusers_tensors(path, _Model(read.tensors, naming, known), base)
    if known is None:
        assert base is not None
        component, config = quantized_component(base), component_config(base) or {}
        config_from: ConfigFrom = "base"
    else:
        component = known.component
        config, config_from = _config(path, known, tensors, weights, base)
    companions = companions_in(path, beside, base, reading)
    left_out = Counter(name.split(".")[0] for name in beside if not name.startswith(companions.prefixes))
    own = f", with its own {', '.join(sorted(companions.tensors))}" if companions.tensors else ""
    return Source(
        path=path,
        pipeline=base,
        component=component,
        config={**config, **told.config},
        config_from=config_from,
        tensors=tensors,
        companions=companions.tensors,
        scheduler=told.scheduler,
        kind=f"{kind}, {names}{own}",
        warnings=(
            *read.warnings(path),
            *_config_warning(path, told, config),
            *prediction_warnings(path, told, base, config, tensors),
            *companions.warnings,
            *_left_out_warning(path, left_out, base),
        ),
    )


def _base_names(base: Path | None) -> frozenset[str]:
    """The names of the tensors of the base's class."""
    config = component_config(base) if base else None
    return frozenset(shapes_of(config, where=str(base))) if config else frozenset()


def _recognized(
    tensors: Mapping[str, TensorEntry], base: Path | None
) -> tuple[Naming | None, KnownClass | None]:
    """The table and the class that the names tell. A base may be of a class whose names begin as a known one's do."""
    for naming in NAMINGS:
        if naming.signature <= tensors.keys():
            own = base is not None and (
                tensors.keys() == _base_names(base) or _is_all_of(_base_class(base), naming, tensors)
            )
            return (None, None) if own else (naming, known_class(naming.model_class))
    known = class_of_names(tensors)
    config = component_config(base) if base else None
    if known is None or config is None or _is_class(known, config):
        return None, known
    weights, _ = without_markers(tensors, str(config.get("_class_name")))
    return None, None if weights.keys() == _base_names(base) else known


def _is_all_of(model_class: str, other: Naming, tensors: Mapping[str, TensorEntry]) -> bool:
    """Whether the class has a table of its own that gives every tensor a place: HunyuanVideo has names in ComfyUI that
    tell FLUX.1 elsewhere."""
    naming = naming_of(model_class)
    if naming is None or naming is other:
        return False
    try:
        return not convert_names(naming, tensors)[1]
    except ValueError:
        return False


def _require_known_to_base(
    path: Path, model: Mapping[str, TensorEntry], stored: Mapping[str, TensorEntry], base: Path | None
) -> None:
    """A base has the config of any class; whether these are its tensors is seen when the plan is made."""
    refuse_other_files(path, [entry.origin for entry in (model or stored).values()])
    if base is None or component_config(base) is None:
        raise _unknown_model(path, model, stored)


def _unknown_model(
    path: Path, tensors: Mapping[str, TensorEntry], stored: Mapping[str, TensorEntry]
) -> InputError:
    first = ", ".join(sorted(stored)[:3]) or "no tensors"
    if pipeline := _published_with_table(tensors) or published_pipeline({**tensors, **stored}):
        return InputError(
            f"{path}: a model as in {pipeline}, whose config can't be derived from its names and shapes alone",
            hint=f"name that pipeline, or another of the same model: --base {pipeline} (recipe: model.base)",
            where=str(path),
            kind="needs-base",
        )
    return InputError(
        f"{path}: not a diffusion model that svdq supports as a single file; it holds {first}",
        hint="for a model with diffusers' names add --base FOLDER_OR_HUB_ID; for others give a diffusers folder",
        where=str(path),
        kind="unknown-family",
    )


def _published_with_table(tensors: Mapping[str, TensorEntry]) -> str | None:
    """The Hub id of the pipeline that a file belongs to, where diffusers itself does not know such files."""
    return next(
        (n.published for n in NAMINGS_WITH_BASE if n.published and n.signature <= tensors.keys()), None
    )


def _diffusers_tensors(path: Path, part: _Model, base: Path | None) -> tuple[Mapping[str, TensorEntry], str]:
    """The tensors under diffusers' names, and what their own names are."""
    if part.naming is None and part.known is not None:
        return part.tensors, _DIFFUSERS_NAMES
    if part.naming is None:
        assert base is not None
        return _named_by_base(path, part.tensors, base)
    try:
        converted, unknown = convert_names(part.naming, part.tensors)
    except ValueError as error:
        raise InputError(
            f"{path}: {error}: does not fit a {part.naming.model_class}",
            hint="the file is damaged or belongs to a different model",
            where=str(path),
        ) from error
    if unknown and base is not None and _base_class(base) != part.naming.model_class:
        return _named_by_base(path, part.tensors, base)  # a relative, with more than the table speaks of
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} tensors have no place in {part.naming.model_class}: {', '.join(unknown[:5])}"
            + (", ..." if len(unknown) > 5 else ""),
            hint="the file holds a variant of the model, or an adapter was saved into it",
            where=next(iter(unknown)),
            kind="unknown-family",
        )
    return converted, part.naming.name


def _named_by_base(
    path: Path, tensors: Mapping[str, TensorEntry], base: Path
) -> tuple[Mapping[str, TensorEntry], str]:
    """The tensors of a class that a base tells: diffusers' names, or names that diffusers or svdq's table converts.

    Raises InputError (kind `unread-names`) where the names are neither. Whether the tensors are all of the model's is
    seen when the plan is made.
    """
    config = component_config(base) or {}
    wanted = shapes_of(config, where=str(base))
    if tensors.keys() == wanted.keys():
        return tensors, _DIFFUSERS_NAMES
    model_class = _base_class(base)
    by_library = convert_by_library(model_class, config, tensors, wanted)
    by_table = _by_table(model_class, tensors)
    own, library, table = (len(found.keys() & wanted.keys()) for found in (tensors, by_library, by_table))
    if max(own, library, table) * 2 < len(wanted):
        first = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise InputError(
            f"{path}: its tensor names are unknown to svdq as a single file, with a base {base} that is a "
            f"{model_class}: {first}",
            hint="convert the model's diffusers folder, or name a base of the same model",
            where=str(path),
            kind="unread-names",
        )
    if own >= max(library, table):
        return tensors, _DIFFUSERS_NAMES
    if library >= table:
        return by_library, "original names, as diffusers converts them"
    return by_table, "original names"


def _by_table(model_class: str, tensors: Mapping[str, TensorEntry]) -> Mapping[str, TensorEntry]:
    """What svdq's table for the class makes of the names; nothing where it has none, or they are others."""
    naming = naming_of(model_class)
    try:
        return convert_names(naming, tensors)[0] if naming is not None else {}
    except ValueError:
        return {}


def _config(
    path: Path,
    known: KnownClass,
    tensors: Mapping[str, TensorEntry],
    original: Mapping[str, TensorEntry],
    base: Path | None,
) -> tuple[Mapping[str, object], ConfigFrom]:
    """The base's config where there is one, else the published model's that has these shapes."""
    given = _base_config(path, known, base) if base else None
    if given is None:
        config = published_config(known, tensors, original)
        if config is None:
            raise InputError(
                f"{path}: a {known.model_class}, whose config can't be derived from its names and shapes alone",
                hint=BASE_HINT,
                where=str(path),
                kind="needs-base",
            )
        return config, "shapes"
    facts, beside = known.facts(tensors), known.beside(original)
    for name, value in sorted(
        {**{name: facts[name] for name in known.compared & given.keys()}, **beside}.items()
    ):
        if given.get(name) != value:
            raise InputError(
                f"{path}: {name} is {value} here, but {given.get(name)} in the base {base}",
                hint=f"the base is a different variant; {BASE_HINT}",
                where=name,
                kind="wrong-base",
            )
    return {**given, **{name: facts[name] for name in known.counted}}, "base"


def _base_config(path: Path, known: KnownClass, base: Path) -> Mapping[str, object] | None:
    """The base's config of the component, which must be of the same class; None where the base lacks it."""
    component = quantized_component(base)
    if component != known.component:
        raise _wrong_base(path, known, base, f"a pipeline with a {component}")
    config = component_config(base)
    if config is not None and not _is_class(known, config):
        raise _wrong_base(path, known, base, f"a {config['_class_name']}")
    return config


def _is_class(known: KnownClass, config: Mapping[str, object]) -> bool:
    found = config.get("_class_name", known.model_class)
    return found in (known.model_class, known.legacy_name, *known.relatives)


def _base_class(base: Path | None) -> str:
    config = component_config(base) if base else None
    return str((config or {}).get("_class_name"))


def _wrong_base(path: Path, known: KnownClass, base: Path, found: str) -> InputError:
    return InputError(
        f"{path} is a {known.model_class}, the base {base} is {found}",
        hint=BASE_HINT,
        where=str(base),
        kind="wrong-base",
    )


def _config_warning(path: Path, told: Told, config: Mapping[str, object]) -> tuple[str, ...]:
    """Where the markers say another thing than the base."""
    changed = [f"{key}: {value}" for key, value in told.config.items() if config.get(key, value) != value]
    if not changed:
        return ()
    return (
        f"{path}: {' and '.join(told.by)} says {', '.join(changed)}, but the base does not; the file wins",
    )


def _left_out_warning(path: Path, left_out: Mapping[str, int], base: Path | None) -> Iterator[str]:
    """What is in the file besides the model and was not taken: parts of a pipeline, and what no output has (averaged
    weights, a schedule of noise levels)."""
    components = {prefix.split(".")[0] for prefix in PREFIXES} | set(pipeline_index(base) if base else ())
    of_base = {name: count for name, count in left_out.items() if base and name in components}
    rest = {name: count for name, count in left_out.items() if name not in of_base}
    if of_base:
        yield f"{path}: also holds {_named(of_base)}; the output takes these from {base}"
    if rest:
        why = "not part of the pipeline, left out" if base else "the output has only the diffusion model"
        yield f"{path}: also holds {_named(rest)}; {why}"


def _named(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({counted(count, 'tensor')})" for name, count in sorted(groups.items()))
