"""Checkpoints on disk: written whole or not at all, opened again for check, inspect and run.

A checkpoint is a copy of the source's pipeline folder in which one component is quantized (or that component's folder
alone, where the source was one). Provenance travels in the weight file's safetensors metadata.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from svdq_cli.errors import InputError, OutOfResourcesError, UsageError
from svdq_cli.families import find_family
from svdq_cli.formats import FORMATS
from svdq_cli.formats.contract import Format, TensorSpec
from svdq_cli.plan import take_inventory
from svdq_cli.records import LayerPlan, LayerSolution, Linear, ModelPlan, Precision
from svdq_cli.source import COMPONENTS, Source, index_component, read_json, read_tensor
from svdq_cli.structure import STRUCTURAL

WEIGHT_FILE = "diffusion_pytorch_model.safetensors"
REPORT_FILE = "svdq_report.json"
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
}
_METADATA_KEY = "svdq"
# Other frameworks' and pickled copies of weights that a hub folder may hold beside its safetensors.
_NOT_COPIED = shutil.ignore_patterns(
    "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx*"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A quantized model on disk, indexed from its headers."""

    source: Source  # the folder's index; its tensors are the packed ones
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

    def packed_specs(self) -> dict[str, TensorSpec]:
        """Every packed tensor this checkpoint must hold, by full name."""
        return {
            f"{plan.name}.{suffix}": spec
            for plan in self.layers
            for suffix, spec in self.format.tensor_specs(plan, self.dtype).items()
        }

    def kept_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that stays at 16 bit, by full name."""
        quantized = {plan.name for plan in self.layers}
        return {name: shape for name, shape in self.state.items() if layer_of(name) not in quantized}

    def solution(self, plan: LayerPlan) -> LayerSolution:
        """One layer, decoded. Raises InputError naming layer and tensor."""
        prefix = plan.name + "."
        names = [name for name in self.source.tensors if name.startswith(prefix)]
        tensors = {name[len(prefix) :]: read_tensor(self.source, name) for name in names}
        return self.format.decode(plan, tensors)


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a folder holds a quantized component (whatever tool wrote it)."""
    folder = _component_folder(path)
    if folder is None:
        return False
    try:
        return "quantization_config" in read_json(folder / "config.json")
    except InputError:
        return False


def open_checkpoint(path: Path) -> Checkpoint:
    """Index a checkpoint. Raises InputError when it is not one, or of a format svdq does not read."""
    folder = _component_folder(path)
    if folder is None:
        kind = "not-found" if not path.exists() else "input"
        raise InputError(
            f"{path}: {'no such folder' if kind == 'not-found' else 'not a checkpoint folder'}",
            hint="give a folder that svdq convert wrote",
            where=str(path),
            kind=kind,
        )
    pipeline = path if (path / "model_index.json").is_file() else None
    source = index_component(folder, pipeline=pipeline, component=folder.name if pipeline else "transformer")
    section = source.config.get("quantization_config")
    if not isinstance(section, dict):
        raise InputError(
            f"{path}: this model is not quantized",
            hint="give a folder that svdq convert wrote; svdq convert makes one from this model",
            where=str(path),
        )
    config = cast("dict[str, object]", section)
    fmt = next((fmt for fmt in FORMATS if fmt.sniff(folder)), None)
    if fmt is None:
        raise InputError(
            f"{folder}: quantized by {config.get('quant_method', 'an unknown method')}, which svdq does not read",
            hint=f"svdq reads {', '.join(fmt.name for fmt in FORMATS)}",
            where=str(folder),
        )
    family = find_family(source.config)
    inventory = take_inventory(source, family)
    facts = fmt.parse_metadata(config)
    layers = fmt.layer_plans(facts, specs_of_headers(source))
    quantized = {plan.name for plan in layers}
    return Checkpoint(
        source=source,
        format=fmt,
        precision=facts.precision,
        rank=facts.rank,
        dtype=facts.dtype,
        layers=layers,
        kept=tuple(linear for linear in inventory.linears if linear.name not in quantized),
        family=family.name if family else STRUCTURAL,
        model_class=inventory.model_class,
        parameters=inventory.parameters,
        state=inventory.state,
        provenance=_read_provenance(source),
    )


def specs_of_headers(source: Source) -> dict[str, TensorSpec]:
    """Shapes and dtypes of all tensors, from the headers."""
    return {
        name: TensorSpec(entry.shape, TORCH_DTYPES[entry.dtype])
        for name, entry in source.tensors.items()
        if entry.dtype in TORCH_DTYPES
    }


def layer_of(tensor: str) -> str:
    """The module a plain tensor belongs to: "proj_out.weight" -> "proj_out"."""
    return tensor.removesuffix(".weight").removesuffix(".bias")


def predicted_bytes(
    plan: ModelPlan, state: Mapping[str, tuple[int, ...]], fmt: Format, dtype: torch.dtype
) -> int:
    """The quantized component's tensor bytes, from the plan alone."""
    total = 0
    quantized = {layer.name for layer in plan.layers}
    for layer in plan.layers:
        total += sum(spec.bytes for spec in fmt.tensor_specs(layer, dtype).values())
    for name, shape in state.items():
        if layer_of(name) not in quantized:
            total += _count(shape) * dtype.itemsize
    return total


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raises UsageError when the output is there already, before any work is done."""
    if path.exists() and not overwrite:
        raise UsageError(
            f"{path}: the output exists already",
            hint="choose another name with -o, or give --overwrite to replace it",
            where=str(path),
            kind="output-exists",
        )


def require_disk(path: Path, needed: int) -> None:
    """Raises OutOfResourcesError when the disk can't hold `needed` more bytes."""
    parent = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutOfResourcesError(
            f"{path}: needs {needed / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB left",
            hint="free some space, or write to another disk with -o",
            where=str(path),
            kind="disk-full",
        )


@contextmanager
def whole_folder(path: Path, *, overwrite: bool) -> Generator[Path, None, None]:
    """A folder that appears at `path` complete or not at all: yields a partial folder beside it, renamed at the end.

    Whatever happens inside, nothing is left under the final name but a whole output (or the old one).
    """
    refuse_existing(path, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_errors(path):
            partial.mkdir(parents=True)
            yield partial
            _sync(partial)
            if path.exists():
                old = path.with_name(f".{path.name}.old-{os.getpid()}")
                path.rename(old)
                partial.rename(path)
                _remove(old)
            else:
                partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Generator[None, None, None]:
    """Turn the system's disk errors into svdq's, naming the output and the cure."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise OutOfResourcesError(
                f"{path}: the disk is full",
                hint="free some space, or write to another disk with -o; nothing was left under the final name",
                where=str(path),
                kind="disk-full",
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UsageError(
                f"{path}: can't write there: {error.strerror}",  # type: ignore[union-attr]
                hint="choose a folder you may write to with -o",
                where=str(path),
            ) from error
        raise


def write_pipeline(
    folder: Path,
    *,
    source: Source,
    plan: ModelPlan,
    solutions: Mapping[str, LayerSolution],
    kept: Callable[[str], Tensor],
    fmt: Format,
    dtype: torch.dtype,
    provenance: Mapping[str, object],
) -> Path:
    """Fill `folder` with the source's pipeline, its component quantized. Returns the weight file's path.

    `kept(name)` reads a tensor that is stored at 16 bit. The bytes depend on the arguments alone.
    """
    component = folder / source.component if source.pipeline else folder
    if source.pipeline:
        _copy_pipeline(source.pipeline, folder, skip=source.component)
    component.mkdir(exist_ok=True)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    config.setdefault("_class_name", plan.model_class)
    config["quantization_config"] = fmt.metadata(plan, dtype)
    (component / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )

    tensors: dict[str, Tensor] = {}
    for name, solution in solutions.items():
        tensors |= {
            f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in fmt.encode(solution).items()
        }
    for name in source.tensors:
        if layer_of(name) not in solutions:
            tensors[name] = kept(name).to(dtype).contiguous()
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(provenance, sort_keys=True)}
    save_file(tensors, component / WEIGHT_FILE, metadata=metadata)
    _sort_metadata(component / WEIGHT_FILE)
    return component / WEIGHT_FILE


def _sort_metadata(path: Path) -> None:
    """Put the header's metadata in order: safetensors writes a hash map, whose order changes from run to run."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = cast("dict[str, object]", json.loads(file.read(length)))
        kept = cast("dict[str, str]", header.pop("__metadata__", {}))
        ordered = {"__metadata__": dict(sorted(kept.items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(
                f"{path}: the header grew from {length} to {len(text)} bytes when it was put in order"
            )
        file.seek(8)
        file.write(text.ljust(length))  # the format allows trailing spaces


def _copy_pipeline(source: Path, target: Path, *, skip: str) -> None:
    """Copy the other components. The source's README stays behind: it describes another model."""
    index = read_json(source / "model_index.json")
    shutil.copyfile(source / "model_index.json", target / "model_index.json")
    for name in index:
        if name != skip and not name.startswith("_") and (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=_NOT_COPIED, copy_function=shutil.copyfile)
    for text in source.glob("LICENSE*"):
        shutil.copyfile(text, target / text.name)


def _component_folder(path: Path) -> Path | None:
    if (path / "model_index.json").is_file():
        return next((path / name for name in COMPONENTS if (path / name / "config.json").is_file()), None)
    return path if (path / "config.json").is_file() else None


def _read_provenance(source: Source) -> Mapping[str, object] | None:
    """What svdq wrote of a checkpoint's making into its metadata; None for a checkpoint that others made."""
    for file in source.files:
        with cast("_OpenTensors", safe_open(file, framework="pt")) as opened:
            text = (opened.metadata() or {}).get(_METADATA_KEY)
        if text:
            try:
                value: object = json.loads(text)
            except json.JSONDecodeError:
                return None
            return cast("dict[str, object]", value) if isinstance(value, dict) else None
    return None


class _OpenTensors(Protocol):
    """What is used here of safetensors' file object, which comes without types."""

    def __enter__(self) -> _OpenTensors: ...
    def __exit__(self, *error: object) -> None: ...
    def metadata(self) -> dict[str, str] | None: ...


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _sync(folder: Path) -> None:
    """Force every file to the disk before the rename makes it visible."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
