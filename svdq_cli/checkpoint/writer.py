"""Checkpoints are written whole or not at all: a folder for diffusers, or one file for the runtimes that read one."""

from __future__ import annotations

import glob
import json
import math
import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from svdq_cli.checkpoint.assembly import join_layers, kept_tensor
from svdq_cli.checkpoint.biases import moved_biases, moved_sizes
from svdq_cli.checkpoint.branches import require_solved_together
from svdq_cli.checkpoint.file_layout import EMPTY, FileLayout, KeptTensor, StoredModule, files_of, kept_shapes
from svdq_cli.checkpoint.match_layout import Layout, known_layout, lay_out_denoisers, marker_names
from svdq_cli.checkpoint.reader import PROVENANCE
from svdq_cli.errors import UsageError
from svdq_cli.families.layouts.layout import ModelLayout
from svdq_cli.formats.contract import Format
from svdq_cli.formats.headers import BIASES, COMPONENT, CONFIG, FORMAT, RANKS, SCHEDULER, as_text, biases_text
from svdq_cli.planning.plan import restricted
from svdq_cli.records import LayerSolution, ModelPlan, Precision
from svdq_cli.reports import OutputFile, json_text
from svdq_cli.sampling import SAMPLING_FILE
from svdq_cli.sampling.schedulers import write_scheduler
from svdq_cli.source import (
    COMPONENTS,
    TensorEntry,
    component_of,
    file_sha256,
    has_settings,
    pipeline_index,
    tensors_sha256,
    unread_variants,
    weight_files,
)
from svdq_cli.source.modular_index import index_of_copy
from svdq_cli.source.variants import without_variant
from svdq_cli.storage.atomic import write_text
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.output_paths import REPORT_FILE
from svdq_cli.storage.pipeline_index import index_file, is_modular
from svdq_cli.storage.tensor_file import DTYPE_OF_NAME, TensorSpec, file_bytes, write_tensors
from svdq_cli.system.threads import cores, prefetch

SHARD_BYTES = 10_000_000_000  # the most that diffusers itself puts into one file
_PACKERS = 2  # threads; few, because each holds a module
WEIGHT_FILE = "diffusion_pytorch_model.safetensors"
# Other frameworks' and pickled copies of weights that a Hub folder may hold next to its safetensors.
_OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx*")
_NO_WEIGHTS = (*_OTHER_WEIGHTS, "*.safetensors", "*.safetensors.index*.json")


@dataclass(frozen=True, slots=True)
class Target:
    """One output to write: its format, and what becomes of the model in it."""

    format: Format
    layout: Layout
    file: FileLayout  # of all denoisers, under their joint names
    plan: ModelPlan  # of the model's layers, as far as this file holds them in 4 bits
    dtype: torch.dtype  # of everything that is stored in 16 bits

    @property
    def stored_plan(self) -> ModelPlan:
        """The plan as the format sees it: its stored modules."""
        return replace(self.plan, layers=tuple(module.plan for module in self.file.modules))

    def denoisers(self) -> dict[str, Target]:
        """The contents of every denoiser, by component: stored under its own names, and without those that
        have no 4-bit layer."""
        files = files_of(self.file, self.plan.components)
        return {
            component: replace(
                self, file=file, plan=restricted(self.plan, {layer.name for layer in file.layers})
            )
            for component, file in files.items()
            if file.modules
        }

    def metadata(self) -> dict[str, object]:
        """What tells the runtime what is quantized, of one denoiser. UsageError where the format can't say it."""
        return self.format.metadata(self.stored_plan, self.dtype)

    def bytes(self, state: Mapping[str, tuple[int, ...]]) -> int:
        """The tensors' bytes, before any of them exists. `state`: the model's tensors, name to shape."""
        packed = sum(
            spec.bytes
            for module in self.file.modules
            for spec in self.format.tensor_specs(module.plan, self.dtype, module.traits).values()
        )
        kept = sum(
            torch.Size(state[name]).numel() for tensor in self.file.kept.values() for name in tensor.sources
        )
        return packed + kept * self.dtype.itemsize


def require_precision(fmt: Format, precision: Precision) -> None:
    """UsageError where the format has no such layers."""
    if precision not in fmt.precisions:
        raise UsageError(
            f"{fmt.name} stores {' or '.join(p.name for p in fmt.precisions)}, not {precision.name}",
            hint=f"use --precision {fmt.precisions[0].name}, or another format",
            where="quantization.precision",
        )


def target_of(
    fmt: Format, plan: ModelPlan, state: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Target:
    """What becomes of a plan in a format. UsageError where the format can't hold or say it.

    `state`: the model's tensors, name to shape. Layers without a 4-bit module in the file stay at 16 bits.
    """
    for layer in plan.w4a4:
        require_precision(fmt, layer.precision)
    if fmt.single_file and len(plan.components) > 1:
        raise UsageError(
            f"{fmt.name} stores one denoiser a file, and this pipeline has {' and '.join(plan.components)}",
            hint="convert them separately with --denoiser NAME, or export their folders (CKPT/NAME): runtimes that "
            "read such files load each one separately",
            where=plan.components[1],
            kind="several-denoisers",
        )
    layout = known_layout(fmt, plan.family, plan.model_class)
    file = lay_out_denoisers(fmt, layout, plan, state)
    for module in file.modules:
        require_solved_together(module, plan.inputs)
    held = {layer.name for layer in file.layers}
    because = {layer.name: f"{fmt.name} has no 4-bit module for them" for layer in plan.layers}
    target = Target(fmt, layout, file, restricted(plan, held, because), dtype)
    for denoiser in target.denoisers().values():
        denoiser.metadata()  # refuses now what the format could not say at the end
    return target


@dataclass(frozen=True, slots=True)
class Contents:
    """The numbers of a checkpoint, by the model's own names, and how they were made."""

    configs: Mapping[str, Mapping[str, object]]  # of every denoiser, by component, without any quantization
    state: Mapping[str, tuple[int, ...]]  # the model's tensors, name to shape
    solutions: Mapping[str, LayerSolution]
    kept: Callable[[str], Tensor]  # reads a tensor that is stored at 16 bits
    provenance: Mapping[str, object] | None
    # settings that the model needs of whatever scheduler it is run with
    scheduler: Mapping[str, object] = field(default_factory=dict)


def report_path(output: Path, fmt: Format) -> Path:
    """Where the report of an output is stored: in a folder, or next to a file."""
    return output.with_name(f"{output.name}.report.json") if fmt.single_file else output / REPORT_FILE


def write_report(path: Path, report: object) -> None:
    """A command's report as the JSON object that it prints."""
    write_text(path, json_text(report) + "\n")


def output_file(
    fmt: Format, path: Path, weights: Sequence[Path], stop: threading.Event | None = None
) -> OutputFile:
    """The facts of an output that will be stored at `path`; bytes and digests are those of its weight files.
    CancelledError once `stop` is set."""
    return written_file(fmt.name, path, weights, stop)


def written_file(
    name: str, path: Path, weights: Sequence[Path], stop: threading.Event | None = None
) -> OutputFile:
    """`output_file` of a kind of file that is no checkpoint's format."""
    size = sum(file.stat().st_size for file in weights)
    content = tensors_sha256(weights, stop)
    return OutputFile(name, str(path), size, file_sha256(*weights, stop=stop), content)


def write_target(
    path: Path,
    target: Target,
    contents: Contents,
    *,
    pipeline: Path | None,
    weightless: Collection[str] = (),
) -> tuple[Path, ...]:
    """Write one output to `path`: the pipeline's folder with its denoisers quantized (or the only one's alone, without
    a pipeline), or a single file. Returns the weight files. The bytes depend on the arguments alone.

    `weightless`: components that are copied without their weights, which the caller writes.
    """
    denoisers = target.denoisers()
    if target.format.single_file:
        ((component, denoiser),) = denoisers.items()
        return _write_file(path, component, denoiser, contents)
    path.mkdir(parents=True, exist_ok=True)
    if pipeline:
        copy_pipeline(pipeline, path, skip=denoisers, weightless=weightless)
        if not has_settings(pipeline, contents.scheduler):
            write_scheduler(path, pipeline, contents.scheduler)
    weights: list[Path] = []
    for component, denoiser in denoisers.items():
        folder = path / component if pipeline else path
        weights += _write_component(folder, denoiser, contents, contents.configs[component])
    return tuple(weights)


def replace_weights(folder: Path, entries: Mapping[str, TensorEntry], read: Callable[[str], Tensor]) -> None:
    """Put other weights of the same names into a component's folder, as one file, one tensor after the other."""
    old = weight_files(folder)
    name = "model.safetensors" if old[0].name.startswith("model") else WEIGHT_FILE
    for file in (*old, *folder.glob("*.safetensors.index.json")):
        file.unlink()
    specs = {key: TensorSpec(entry.shape, DTYPE_OF_NAME[entry.dtype]) for key, entry in entries.items()}
    with write_tensors(folder / name, specs, {"format": "pt"}) as writer:
        for key in entries:
            writer.write(key, read(key))


def _write_component(
    folder: Path, target: Target, contents: Contents, config: Mapping[str, object]
) -> tuple[Path, ...]:
    folder.mkdir(exist_ok=True)
    config = {**_with_class(target, config), "quantization_config": target.metadata()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return _save(folder / WEIGHT_FILE, target, contents, {}, limit=SHARD_BYTES)


def _write_file(path: Path, component: str, target: Target, contents: Contents) -> tuple[Path, ...]:
    biases: dict[str, Tensor] = {}
    for module in target.file.modules:
        biases |= moved_biases(module, contents.solutions)
    metadata = _metadata_of_file(component, target, contents, biases)
    path.parent.mkdir(parents=True, exist_ok=True)
    markers = marker_names(target.layout, contents.configs[component])
    return _save(path, target, contents, metadata, markers=markers)


def _metadata_of_file(
    component: str, target: Target, contents: Contents, biases: Mapping[str, Tensor]
) -> dict[str, str]:
    """What the header of a single file says, but for the provenance. `biases`: those that modules hold moved."""
    fmt = target.format
    config = _with_class(target, contents.configs[component])

    def own_name(layer: str) -> str:
        return component_of(target.plan.components, layer)[1]

    own = {
        CONFIG: config,
        FORMAT: fmt.name,
        RANKS: {own_name(layer.name): layer.rank for layer in target.plan.w4a4},
        BIASES: biases_text({own_name(name): bias for name, bias in biases.items()}),
        **({} if component in COMPONENTS else {COMPONENT: component}),
        **({SCHEDULER: contents.scheduler} if contents.scheduler else {}),
    }
    layout = target.layout if isinstance(target.layout, ModelLayout) else None
    return as_text({**fmt.model_metadata(layout, config), **target.metadata(), **own})


def weight_bytes(target: Target, contents: Contents) -> int:
    """The size of the weight files that `write_target` writes, headers included, before any number exists.

    `contents` needs no solutions. Of its provenance, numbers count with the digits that they have.
    """
    total = 0
    for component, denoiser in target.denoisers().items():
        metadata, markers, limit = {}, (), float(SHARD_BYTES)
        if target.format.single_file:
            sizes = {k: n for module in denoiser.file.modules for k, n in moved_sizes(module).items()}
            biases = {name: torch.zeros(size, dtype=target.dtype) for name, size in sizes.items()}
            metadata = _metadata_of_file(component, denoiser, contents, biases)
            markers, limit = marker_names(target.layout, contents.configs[component]), math.inf
        for pieces in _shards([*_pieces(denoiser, contents), *map(_empty, markers)], limit):
            total += file_bytes(_specs(pieces), _with_provenance(metadata, contents))
    return total


def _with_provenance(metadata: Mapping[str, str], contents: Contents) -> dict[str, str]:
    said = {"format": "pt", **metadata}
    if contents.provenance is not None:
        said[PROVENANCE] = json.dumps(contents.provenance, sort_keys=True)
    return said


def _with_class(target: Target, given: Mapping[str, object]) -> dict[str, object]:
    config = {key: value for key, value in given.items() if key != "quantization_config"}
    config.setdefault("_class_name", target.plan.model_class)
    return config


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tensors that are written together: a stored module's, or one 16-bit tensor. Their numbers are made when they are
    asked for."""

    specs: Mapping[str, TensorSpec]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs.values())


def _pieces(target: Target, contents: Contents) -> list[_Piece]:
    """All of a file, from names and shapes alone."""

    def packed(module: StoredModule) -> dict[str, Tensor]:
        stored = target.format.encode(join_layers(module, contents.solutions), module.traits)
        return {f"{module.name}.{suffix}": tensor for suffix, tensor in stored.items()}

    def kept(name: str, tensor: KeptTensor) -> dict[str, Tensor]:
        parts = [contents.kept(source).to(target.dtype) for source in tensor.sources]
        return {name: kept_tensor(tensor, parts)}

    modules = [
        _Piece(
            {
                f"{module.name}.{suffix}": spec
                for suffix, spec in target.format.tensor_specs(
                    module.plan, target.dtype, module.traits
                ).items()
            },
            partial(packed, module),
        )
        for module in target.file.modules
    ]
    others = [
        _Piece({name: TensorSpec(shape, target.dtype)}, partial(kept, name, target.file.kept[name]))
        for name, shape in kept_shapes(target.file, contents.state).items()
    ]
    return [*modules, *others]


def _specs(pieces: Sequence[_Piece]) -> dict[str, TensorSpec]:
    return {name: spec for piece in pieces for name, spec in piece.specs.items()}


def _empty(name: str) -> _Piece:
    return _Piece({name: EMPTY}, lambda: {name: torch.empty(EMPTY.shape, dtype=EMPTY.dtype)})


def _save(
    path: Path,
    target: Target,
    contents: Contents,
    metadata: Mapping[str, str],
    *,
    markers: Sequence[str] = (),
    limit: float = math.inf,
) -> tuple[Path, ...]:
    """The weights as one file, or as shards next to each other where they are more than `limit` bytes. No more than
    three modules are in memory. Returns the files."""
    said = _with_provenance(metadata, contents)
    shards = _shards([*_pieces(target, contents), *map(_empty, markers)], limit)
    files = [path] if len(shards) == 1 else [_shard_name(path, n, len(shards)) for n in range(len(shards))]
    for file, pieces in zip(files, shards, strict=True):
        with write_tensors(file, _specs(pieces), said) as writer:
            for _, tensors in prefetch(pieces, lambda piece: piece.make(), threads=cores(_PACKERS)):
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
    if len(shards) > 1:
        _write_index(path, files, shards)
    return tuple(files)


def _shards(pieces: Sequence[_Piece], limit: float) -> list[list[_Piece]]:
    """Tensors in their order, distributed to shards, each as full as the limit allows."""
    shards: list[list[_Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + piece.bytes > limit:
            shards.append([])
        shards[-1].append(piece)
    return shards


def _shard_name(path: Path, number: int, count: int) -> Path:
    """diffusers' own: diffusion_pytorch_model-00001-of-00003.safetensors."""
    return path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}{path.suffix}")


def _write_index(path: Path, files: Sequence[Path], shards: Sequence[Sequence[_Piece]]) -> None:
    """Write the index of shards (tensor -> shard), as diffusers and transformers read it."""
    weight_map = {
        name: file.name
        for file, pieces in zip(files, shards, strict=True)
        for piece in pieces
        for name in piece.specs
    }
    total = sum(piece.bytes for pieces in shards for piece in pieces)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.with_name(f"{path.name}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- whole or nothing


def copy_pipeline(
    source: Path, target: Path, *, skip: Collection[str], weightless: Collection[str] = ()
) -> None:
    """Copy the other components, and how the model is sampled; those that are `weightless` without their weights. The
    source's README stays behind: it describes another model."""
    index = pipeline_index(source)
    listed = index_file(source)
    assert listed is not None  # `pipeline_index` has read it
    if is_modular(source):
        here = {name for name in index if (source / name).is_dir()}
        write_text(target / listed.name, json.dumps(index_of_copy(read_json(listed), here), indent=2) + "\n")
    else:
        shutil.copyfile(listed, target / listed.name)
    for name in index:
        if name not in skip and not name.startswith("_") and (source / name).is_dir():
            patterns = _NO_WEIGHTS if name in weightless else _OTHER_WEIGHTS
            ignore = shutil.ignore_patterns(*patterns, *map(glob.escape, unread_variants(source / name)))
            shutil.copytree(source / name, target / name, ignore=ignore, copy_function=shutil.copyfile)
            without_variant(target / name)
    for text in (*source.glob("LICENSE*"), *source.glob(SAMPLING_FILE)):
        shutil.copyfile(text, target / text.name)
