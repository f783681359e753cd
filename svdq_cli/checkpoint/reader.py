"""Checkpoints on disk, opened again for check, inspect, export and run.

A checkpoint is a copy of the source's pipeline folder in which one component is quantized (or that component's folder
alone, where the source was one), or a single file. Provenance travels in the weight file's safetensors metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from svdq_cli.checkpoint.assembly import source_tensor, take_layer
from svdq_cli.checkpoint.branches import take_branch
from svdq_cli.checkpoint.detect import (
    component_folders,
    file_format,
    folder_format,
    lost_metadata,
    specs_of_headers,
)
from svdq_cli.checkpoint.file_layout import FileLayout, StoredModule, joined_files, kept_shapes, with_prefix
from svdq_cli.checkpoint.match_layout import Layout, known_layout, lay_out, layers_in_file, marker_names
from svdq_cli.errors import InputError, UsageError
from svdq_cli.families import find_family
from svdq_cli.formats.contract import Branch, Format, PackedFacts
from svdq_cli.formats.headers import (
    COMPONENT,
    CONFIG,
    SCHEDULER,
    biases_of,
    json_value,
    ranks_of,
)
from svdq_cli.formats.soundness import SIXTEEN_BIT
from svdq_cli.planning.joint import with_name
from svdq_cli.planning.plan import Inventory, take_inventory
from svdq_cli.planning.structure import STRUCTURAL
from svdq_cli.records import LayerPlan, LayerSolution, Linear, ModelPlan, Precision, W4A4Plan
from svdq_cli.source import (
    Source,
    component_config,
    denoiser_components,
    index_component,
    is_denoiser,
    joined,
    prefix_of,
    read_header,
    read_tensor,
    tensor_entry,
)
from svdq_cli.source.means import means_by_layer, moved_of_json, without_means
from svdq_cli.source.model import MovedMean
from svdq_cli.source.quantized import already_quantized, quantizer_of, refuse_quantized
from svdq_cli.source.tensors import SliceTensor
from svdq_cli.storage.headers import header_metadata
from svdq_cli.storage.pipeline_index import is_pipeline
from svdq_cli.storage.tensor_file import TensorSpec

PROVENANCE = "svdq"  # key of the safetensors metadata
MOVED_MEANS = "means"  # key of the provenance: `source.means.moved_json`


# Without slots: `by_name` is kept in the instance
@dataclass(frozen=True)
class Checkpoint:
    """A quantized model on disk, indexed from its headers. Names are those of the model, not of the file. Several
    denoisers of a pipeline are one checkpoint, under joint names (`source.denoisers`)."""

    source: Source  # the index: the stored tensors and the model's config
    format: Format
    precision: Precision | None  # None when every quantized layer is W4A16, and so is the rank
    rank: int | None
    dtype: torch.dtype  # of everything that is not packed
    layers: tuple[LayerPlan, ...]
    kept: tuple[Linear, ...]
    family: str
    model_class: str
    parameters: int
    state: Mapping[str, tuple[int, ...]]  # the 16-bit model's tensors: name -> shape
    provenance: Mapping[str, object] | None
    file: FileLayout  # which of the file's modules and tensors hold what
    biases: Mapping[str, Tensor]  # by layer: what the file stores moved, as it was
    alone: tuple[Checkpoint, ...] = ()  # each of several denoisers, under its own names
    _decoded: dict[str, LayerSolution] = field(default_factory=dict[str, LayerSolution], compare=False)

    @property
    def denoisers(self) -> tuple[Checkpoint, ...]:
        """Every denoiser alone, under its own names."""
        return self.alone or (self,)

    def plan(self) -> ModelPlan:
        """What became of the model's layers. Which of them share an input, a file does not say."""
        return ModelPlan(
            family=self.family,
            model_class=self.model_class,
            components=self.source.components,
            parameters=self.parameters,
            layers=self.layers,
            kept=self.kept,
            inputs=(),
        )

    @cached_property
    def by_name(self) -> Mapping[str, LayerPlan]:
        """The quantized layers by their names, in the order of `layers`."""
        return {layer.name: layer for layer in self.layers}

    @property
    def moved(self) -> tuple[MovedMean, ...]:
        """The means of inputs that its biases hold. InputError where the header says that wrongly."""
        return moved_of_json((self.provenance or {}).get(MOVED_MEANS))

    def means(self) -> dict[str, Tensor]:
        """The mean that was moved out of each layer's input, (K,) float32, by layer."""
        linears = [*(layer.linear for layer in self.layers), *self.kept]
        return means_by_layer(self.moved, {linear.name: linear.in_features for linear in linears})

    def stored_biases(self, source: Source) -> Source:
        """The model that the checkpoint was made from, with the biases that the checkpoint has."""
        return without_means(source, self.moved, self.dtype)

    def packed_specs(self) -> dict[str, TensorSpec]:
        """Every packed tensor this checkpoint must hold, by stored name."""
        return {
            f"{module.name}.{suffix}": spec
            for module in self.file.modules
            for suffix, spec in self.format.tensor_specs(module.plan, self.dtype, module.traits).items()
        }

    def kept_specs(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that stays at 16 bits, by stored name."""
        return kept_shapes(self.file, self.state)

    def marker_names(self) -> tuple[str, ...]:
        """The empty tensors that must be there for the runtime to tell the variant."""
        layout = known_layout(self.format, self.family, self.model_class)
        return marker_names(layout, self.source.config) if self.format.single_file else ()

    def kept_names(self) -> tuple[str, ...]:
        """The model's tensors that stay at 16 bits."""
        return tuple(name for tensor in self.file.kept.values() for name in tensor.sources)

    def kept_tensor(self, name: str) -> Tensor:
        """One of the model's 16-bit tensors. Of any shape, the model's own."""
        for stored, tensor in self.file.kept.items():
            if name in tensor.sources:
                index = tensor.sources.index(name)
                if tensor.experts:
                    return SliceTensor(tensor_entry(self.source, stored), index).read()
                shapes = [self.state[source] for source in tensor.sources]
                found = read_tensor(self.source, stored)
                return source_tensor(tensor, found, shapes, index)
        raise InputError(f"{self.source.path}: no 16-bit tensor {name}", where=name)

    def solution(self, plan: LayerPlan) -> LayerSolution:
        """One layer, decoded. Raises InputError naming layer and tensor."""
        parts = [(module, self._module(module)) for module in self.file.parts_of(plan.name)]
        return take_layer(plan, parts, self.biases.get(plan.name))

    def branch(self, plan: W4A4Plan) -> Branch:
        """One layer's low-rank branch, without reading its codes."""
        return take_branch(
            plan, [(module, self._stored_branch(module)) for module in self.file.parts_of(plan.name)]
        )

    def _stored_branch(self, module: StoredModule) -> Branch:
        return self.format.decode_branch(_ModuleTensors(self.source, f"{module.name}."), module.traits)

    def unsigned_from(self, plan: LayerPlan) -> int | None:
        """The first of a layer's channels that the runtime quantizes without a sign; None where there is none."""
        starts = [
            m.columns[0] if m.columns else 0 for m in self.file.parts_of(plan.name) if m.traits.unsigned
        ]
        return min(starts, default=None)

    def _module(self, module: StoredModule) -> LayerSolution:
        """A stored module, decoded; the last one is kept, because several layers may be stored in it."""
        if module.name not in self._decoded:
            tensors = dict(_ModuleTensors(self.source, f"{module.name}."))
            decoded = self.format.decode(module.plan, tensors, module.traits)
            self._decoded.clear()
            self._decoded[module.name] = decoded
        return self._decoded[module.name]


@dataclass(frozen=True, slots=True)
class _ModuleTensors(Mapping[str, Tensor]):
    """The stored tensors of one module by suffix, each read when it is asked for."""

    source: Source
    prefix: str

    def __getitem__(self, suffix: str) -> Tensor:
        return read_tensor(self.source, self.prefix + suffix)

    def __iter__(self) -> Iterator[str]:
        depth = self.prefix.count(".")
        names = (name for name in self.source.tensors if name.startswith(self.prefix))
        return (name.removeprefix(self.prefix) for name in names if name.count(".") == depth)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def component_in(pipeline: Path, denoiser: Checkpoint) -> str:
    """The component of a pipeline that a checkpoint of one denoiser replaces."""
    known = denoiser_components(pipeline)
    return denoiser.source.component if denoiser.source.component in known else known[0]


NAME_BASE = "name the pipeline that it was made from: --base FOLDER_OR_HUB_ID, or use the file as svdq convert wrote it"
NAME_AGAINST = (
    "give --against a whole pipeline, or --base FOLDER_OR_HUB_ID, or use the file as svdq convert wrote it"
)
NEEDS_METADATA = (
    "use the file as svdq convert wrote it, or convert the model again; svdq generate --base runs this one"
)


def open_checkpoint(path: Path, *, base: Path | None = None, hint: str = NAME_BASE) -> Checkpoint:
    """Index a checkpoint. `base`: the pipeline that gives the config of a single file whose header has lost it. `hint`:
    what the caller's user can do where it is lost and there is no base.

    Raises InputError when it is not one, or of a format svdq does not read.
    """
    return _open_file(path, base, hint) if path.is_file() else _open_folder(path)


def with_component(denoiser: Checkpoint, component: str) -> Checkpoint:
    """The checkpoint of one denoiser as that component of a pipeline."""
    return replace(denoiser, source=replace(denoiser.source, component=component))


def _open_folder(path: Path) -> Checkpoint:
    folders = component_folders(path)
    if not folders:
        kind = "not-found" if not path.exists() else "input"
        raise InputError(
            f"{path}: {'no such file or folder' if kind == 'not-found' else 'not a checkpoint folder'}",
            hint="give a folder or file that svdq convert wrote",
            where=str(path),
            kind=kind,
        )
    pipeline = path if is_pipeline(path) else None
    return _joined([_open_component(path, folder, pipeline) for folder in folders])


def _open_component(path: Path, folder: Path, pipeline: Path | None) -> Checkpoint:
    component = folder.name if pipeline or is_denoiser(folder.name) else "transformer"
    source = index_component(folder, pipeline=pipeline, component=component)
    section = source.config.get("quantization_config")
    if not isinstance(section, dict):
        refuse_quantized(folder, source.tensors)
        raise InputError(
            f"{path}: this model is not quantized",
            hint="give a folder that svdq convert wrote; svdq convert makes one from this model",
            where=str(path),
        )
    config = cast("dict[str, object]", section)
    fmt = folder_format(folder)
    if fmt is None:
        raise already_quantized(folder, quantizer_of(config), where=str(folder))
    return _indexed(source, fmt, config)


def _joined(denoisers: list[Checkpoint]) -> Checkpoint:
    """Several denoisers as one checkpoint. InputError where they differ in format, precision or dtype."""
    first, *others = denoisers
    if not others:
        return first
    precisions = {denoiser.precision for denoiser in denoisers} - {None}
    for other in others:
        if (other.format.name, other.dtype) != (first.format.name, first.dtype) or len(precisions) > 1:
            raise InputError(
                f"{first.source.path}: {first.source.component} and {other.source.component} differ in format, "
                "precision or dtype",
                hint="convert the whole pipeline",
                where=other.source.component,
            )
    components = [denoiser.source.component for denoiser in denoisers]
    prefixes = [prefix_of(components, component) for component in components]
    pairs = list(zip(prefixes, denoisers, strict=True))
    return replace(
        first,
        source=joined([denoiser.source for denoiser in denoisers]),
        precision=next(iter(precisions), None),
        rank=max((denoiser.rank for denoiser in denoisers if denoiser.rank is not None), default=None),
        layers=tuple(with_name(plan, prefix + plan.name) for prefix, each in pairs for plan in each.layers),
        kept=tuple(
            replace(linear, name=prefix + linear.name) for prefix, each in pairs for linear in each.kept
        ),
        parameters=sum(denoiser.parameters for denoiser in denoisers),
        state={prefix + name: shape for prefix, each in pairs for name, shape in each.state.items()},
        file=joined_files([with_prefix(each.file, prefix) for prefix, each in pairs]),
        biases={prefix + name: bias for prefix, each in pairs for name, bias in each.biases.items()},
        alone=tuple(denoisers),
        _decoded={},
    )


def _open_file(path: Path, base: Path | None, hint: str) -> Checkpoint:
    tensors = read_header(path)  # names a damaged file, or one that is not safetensors
    metadata = header_metadata(path)
    fmt = file_format(path)
    lost = None if fmt else lost_metadata(path)
    if lost is not None:
        fmt = lost[0]
    if fmt is None:
        refuse_quantized(path, tensors)
        raise InputError(
            f"{path}: not a checkpoint of a format that svdq reads",
            hint="give a file that svdq convert wrote, or convert this model with svdq convert",
            where=str(path),
        )
    config = json_value(metadata, CONFIG) or (component_config(base) if base else None)
    if config is None:
        raise InputError(
            f"{path}: a {fmt.name} file whose header does not name its model: its metadata has no {CONFIG!r}; "
            "tools that re-save a file drop it",
            hint=hint,
            where=str(path),
            kind="needs-base",
        )
    component = metadata.get(COMPONENT, "transformer")
    denoiser = component if is_denoiser(component) else "transformer"
    scheduler = json_value(metadata, SCHEDULER) or {}
    source = Source(path, None, denoiser, config, tensors, scheduler=scheduler)
    said = {
        key: json_value(metadata, key) if text.startswith("{") else text for key, text in metadata.items()
    }
    return _indexed(source, fmt, lost[1] if lost else said, ranks_said=lost is None)


def _indexed(
    source: Source, fmt: Format, config: Mapping[str, object], *, ranks_said: bool = True
) -> Checkpoint:
    """What the headers say: the layers behind the stored modules, and where everything else is stored.

    `ranks_said`: whether the header tells a layer's own rank from the sum of those of its stored parts.
    """
    family = find_family(source.config)
    family_name = family.name if family else STRUCTURAL
    inventory = take_inventory(source, family)
    facts = fmt.parse_metadata(config)
    specs = specs_of_headers(source)
    layout = known_layout(fmt, family_name, inventory.model_class)
    metadata = header_metadata(source.path) if fmt.single_file else {}
    linears = {linear.name: linear for linear in inventory.linears}
    stored = fmt.layer_plans(facts, specs)
    layers = layers_in_file(layout, stored, linears, inventory.state, ranks_of(metadata))
    if not ranks_said and fmt.one_rank:
        layers = tuple(_of_rank(layer, facts.rank) for layer in layers)
    dtype = facts.dtype or _common_dtype(specs)
    quantized = {plan.name for plan in layers}
    return Checkpoint(
        source=source,
        format=fmt,
        precision=facts.precision,
        rank=_rank(facts, layers),
        dtype=dtype,
        layers=layers,
        kept=tuple(linear for linear in inventory.linears if linear.name not in quantized),
        family=family_name,
        model_class=inventory.model_class,
        parameters=inventory.parameters,
        state=inventory.state,
        provenance=_read_provenance(source),
        file=_file_layout(fmt, layout, layers, inventory, source),
        biases=biases_of(metadata, dtype),
    )


def _of_rank(layer: LayerPlan, rank: int | None) -> LayerPlan:
    """A layer that is stored in parts has the rank of each of them in a file of one rank."""
    if isinstance(layer, W4A4Plan) and rank is not None and layer.rank > rank:
        return replace(layer, rank=rank)
    return layer


def layer_of(tensor: str) -> str:
    """The module a plain tensor belongs to: "proj_out.weight" -> "proj_out"."""
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _file_layout(
    fmt: Format,
    layout: Layout,
    layers: tuple[LayerPlan, ...],
    inventory: Inventory,
    source: Source,
) -> FileLayout:
    try:
        return lay_out(fmt, layout, layers, inventory.state)
    except UsageError as error:  # what a conversion would refuse to write, a file can't hold
        raise InputError(
            f"{source.path}: {error.message}",
            hint="the file is damaged or incomplete, or a variant that svdq does not read",
            where=error.where,
        ) from error


def _rank(facts: PackedFacts, layers: tuple[LayerPlan, ...]) -> int | None:
    """The rank that the file says, else the largest of its layers'; None without a branch."""
    if facts.rank is not None:
        return facts.rank
    return max((layer.rank for layer in layers if isinstance(layer, W4A4Plan)), default=0) or None


def _common_dtype(specs: Mapping[str, TensorSpec]) -> torch.dtype:
    """The 16-bit dtype that most tensors have."""
    seen = Counter(spec.dtype for spec in specs.values() if spec.dtype in SIXTEEN_BIT)
    return seen.most_common(1)[0][0] if seen else torch.bfloat16


def _read_provenance(source: Source) -> Mapping[str, object] | None:
    """What svdq wrote of a checkpoint's making into its metadata; None for a checkpoint that others made."""
    for file in source.files:
        text = header_metadata(file).get(PROVENANCE)
        if text:
            try:
                value: object = json.loads(text)
            except (ValueError, RecursionError):
                return None
            return cast("dict[str, object]", value) if isinstance(value, dict) else None
    return None
