"""One file with a whole model: original, ComfyUI or diffusers names, 16 or 8 bits, alone or with text encoders beside.

The file is read by its header: which part of it is the diffusion model, what its tensors are called in diffusers, and
what config they belong to. The weights stay on disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from svdq_cli.errors import InputError
from svdq_cli.source.classes import shapes_of
from svdq_cli.source.companions import companions_in
from svdq_cli.source.configs import KnownClass, class_of_names, known_class, published_config
from svdq_cli.source.float8 import FLOAT8, float8_upconverted
from svdq_cli.source.folders import quantized_component, tensors_of_files
from svdq_cli.source.headers import read_json
from svdq_cli.source.library_names import convert_by_library, published_pipeline
from svdq_cli.source.model import ConfigFrom, Source
from svdq_cli.source.names import Naming, convert_names
from svdq_cli.source.original_names import NAMINGS
from svdq_cli.source.other_files import refuse_other_files
from svdq_cli.source.quantized import refuse_quantized
from svdq_cli.source.tensors import SIXTEEN_BIT_OR_MORE, StoredTensor, TensorEntry

# What the diffusion model is called in a file: ComfyUI and LDM checkpoints, ComfyUI adapters' parents, saved pipelines
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "")
_DIFFUSERS_NAMES = "diffusers names"
BASE_HINT = "name a diffusers pipeline of the same model: --base FOLDER_OR_HUB_ID (recipe: model.base)"


@dataclass(frozen=True, slots=True)
class _ModelPart:
    """The diffusion model inside a file, under its own names without their prefix."""

    tensors: Mapping[str, TensorEntry]
    naming: Naming | None  # None: diffusers names
    known: KnownClass | None  # None: the base says what class it is


def has_original_names(names: Collection[str]) -> bool:
    """Whether these are the names of an original checkpoint that svdq has a table for."""
    present = set(names)
    return any(naming.signature <= present for naming in NAMINGS)


def open_single_file(path: Path, *, base: Path | None = None, files: Sequence[Path] = ()) -> Source:
    """Index a single `.safetensors` file, or the shards `files` of one. `base`: a pipeline folder with the parts that
    the file lacks.

    Raises InputError: damaged, already quantized, not a known model, or not the base's model.
    """
    header = tensors_of_files(files or (path,))
    model = _model_tensors(header)
    refuse_quantized(path, model)
    stored, warnings = float8_upconverted(path, model)
    rest = {name: entry for name, entry in header.items() if name not in model}
    companions, prefixes = _companions(path, rest, base)
    left_out = Counter(name.split(".")[0] for name in rest if not name.startswith(prefixes))
    kind = f"{len(files)} shards" if len(files) > 1 else "single file"
    source = source_of_tensors(path, stored, base=base, left_out=left_out, warnings=warnings, kind=kind)
    own = f", with its own {', '.join(sorted(companions))}" if companions else ""
    return replace(source, companions=companions, kind=source.kind + own)


def _companions(
    path: Path, rest: Mapping[str, StoredTensor], base: Path | None
) -> tuple[Mapping[str, Mapping[str, TensorEntry]], tuple[str, ...]]:
    """The text encoders and the autoencoder that the file holds, as far as the base has such components."""
    if base is None:
        return {}, ()
    readable = {name: entry for name, entry in rest.items() if entry.dtype in (*SIXTEEN_BIT_OR_MORE, *FLOAT8)}
    tensors, _ = float8_upconverted(path, readable)
    return companions_in(tensors, base)


def source_of_tensors(
    path: Path,
    stored: Mapping[str, TensorEntry],
    *,
    base: Path | None,
    warnings: tuple[str, ...],
    left_out: Mapping[str, int] = MappingProxyType({}),
    kind: str = "single file",
) -> Source:
    """A source from tensors under whatever names their file has. `left_out` counts what else lies in the file."""
    part = _model_part(path, stored, base)
    tensors, names = _diffusers_tensors(path, part, base)
    if part.known is None:
        assert base is not None
        component, config = quantized_component(base), _component_config(base) or {}
        config_from: ConfigFrom = "base"
    else:
        component = part.known.component
        config, config_from = _config(path, part.known, tensors, base)
    return Source(
        path=path,
        pipeline=base,
        component=component,
        config=config,
        config_from=config_from,
        tensors=tensors,
        kind=f"{kind}, {names}",
        warnings=(*warnings, *_left_out_warning(path, left_out, base)),
    )


def _model_tensors(header: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors below the first prefix that the file uses; all of them where it uses none."""
    for prefix in _PREFIXES:
        if found := {name: entry for name, entry in header.items() if name.startswith(prefix)}:
            return found
    return {}


def _model_part(path: Path, stored: Mapping[str, TensorEntry], base: Path | None) -> _ModelPart:
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in stored)), "")
    tensors = {name.removeprefix(prefix): entry for name, entry in stored.items()}
    for naming in NAMINGS:
        if naming.signature <= tensors.keys():
            return _ModelPart(tensors, naming, known_class(naming.model_class))
    known = class_of_names(tensors)
    if known is None:
        refuse_other_files(path, stored)
    config = _component_config(base) if base else None
    if config is None and known is None:
        raise _unknown_model(path, tensors, stored)
    # A base has the config of any class, also of one whose names begin as a known one's do
    if known is not None and config is not None and not _is_class(known, config):
        wanted = shapes_of(config, where=str(base))
        known = None if tensors.keys() == wanted.keys() else known
    return _ModelPart(tensors, None, known)


def _unknown_model(
    path: Path, tensors: Mapping[str, TensorEntry], stored: Mapping[str, TensorEntry]
) -> InputError:
    first = ", ".join(sorted(stored)[:3]) or "no tensors"
    if pipeline := published_pipeline({**tensors, **stored}):
        return InputError(
            f"{path}: a model as in {pipeline}, whose config can't be told from its names and shapes alone",
            hint=f"name that pipeline, or another of the same model: --base {pipeline} (recipe: model.base)",
            where=str(path),
            kind="needs-base",
        )
    return InputError(
        f"{path}: not a diffusion model that svdq knows as a single file; it holds {first}",
        hint="a model in diffusers' names needs its pipeline (--base FOLDER_OR_HUB_ID), others a diffusers folder",
        where=str(path),
        kind="unknown-family",
    )


def _diffusers_tensors(
    path: Path, part: _ModelPart, base: Path | None
) -> tuple[Mapping[str, TensorEntry], str]:
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
            f"{path}: {error}: not the shape of a {part.naming.model_class}",
            hint="the file is damaged or of another model",
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
    """Of a class that svdq has no table for: diffusers' names, or names that diffusers converts.

    Raises InputError (kind `unread-names`) where the names are neither. Whether the tensors are all of the model's is
    seen when the plan is made.
    """
    config = _component_config(base) or {}
    wanted = shapes_of(config, where=str(base))
    if tensors.keys() == wanted.keys():
        return tensors, _DIFFUSERS_NAMES
    model_class = _base_class(base)
    converted = convert_by_library(model_class, config, tensors, wanted)
    own, library = len(tensors.keys() & wanted.keys()), len(converted.keys() & wanted.keys())
    if max(own, library) * 2 < len(wanted):
        first = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise InputError(
            f"{path}: names that svdq does not read in one file, where the base {base} is a {model_class}: {first}",
            hint="convert the model's diffusers folder, or name a base of the model that this is",
            where=str(path),
            kind="unread-names",
        )
    return (
        (converted, "original names, as diffusers converts them")
        if library > own
        else (tensors, _DIFFUSERS_NAMES)
    )


def _config(
    path: Path, known: KnownClass, tensors: Mapping[str, TensorEntry], base: Path | None
) -> tuple[Mapping[str, object], ConfigFrom]:
    """The base's config where there is one, else the published model's that has these shapes."""
    given = _base_config(path, known, base) if base else None
    if given is None:
        config = published_config(known, tensors)
        if config is None:
            raise InputError(
                f"{path}: a {known.model_class}, whose config can't be told from its names and shapes alone",
                hint=BASE_HINT,
                where=str(path),
                kind="needs-base",
            )
        return config, "shapes"
    facts = known.facts(tensors)
    for name in sorted(known.compared & given.keys()):
        if given[name] != facts[name]:
            raise InputError(
                f"{path}: {name} is {facts[name]} here and {given[name]} in the base {base}",
                hint=f"the base is another variant; {BASE_HINT}",
                where=name,
                kind="wrong-base",
            )
    return {**given, **{name: facts[name] for name in known.counted}}, "base"


def _base_config(path: Path, known: KnownClass, base: Path) -> Mapping[str, object] | None:
    """The base's config of the component, which must be of the same class; None where the base lacks it."""
    component = quantized_component(base)
    if component != known.component:
        raise _wrong_base(path, known, base, f"a pipeline with a {component}")
    config = _component_config(base)
    if config is not None and not _is_class(known, config):
        raise _wrong_base(path, known, base, f"a {config['_class_name']}")
    return config


def _is_class(known: KnownClass, config: Mapping[str, object]) -> bool:
    found = config.get("_class_name", known.model_class)
    return found in (known.model_class, known.legacy_name, *known.relatives)


def _component_config(base: Path) -> Mapping[str, object] | None:
    """The base's config of the component that svdq quantizes, as it was before any quantization."""
    file = base / quantized_component(base) / "config.json"
    if not file.is_file():
        return None
    return {key: value for key, value in read_json(file).items() if key != "quantization_config"}


def _base_class(base: Path) -> str:
    return str((_component_config(base) or {}).get("_class_name"))


def _wrong_base(path: Path, known: KnownClass, base: Path, found: str) -> InputError:
    return InputError(
        f"{path} is a {known.model_class}, the base {base} is {found}",
        hint=BASE_HINT,
        where=str(base),
        kind="wrong-base",
    )


def _left_out_warning(path: Path, left_out: Mapping[str, int], base: Path | None) -> tuple[str, ...]:
    if not left_out:
        return ()
    parts = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(left_out.items()))
    where = f"the output takes these from {base}" if base else "the output has only the diffusion model"
    return (f"{path}: also holds {parts}; {where}",)
