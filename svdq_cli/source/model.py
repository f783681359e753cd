"""`Source`: a 16-bit model on disk, indexed but not read."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.source.headers import read_header
from svdq_cli.source.tensors import TensorEntry, content_sha256, entry_bytes
from svdq_cli.system.threads import prefetch

COMPONENTS = ("transformer", "unet")
# Threads that hash weights; few, because each holds a tensor.
_HASHERS = min(4, os.cpu_count() or 1)
# Where a source's config is from: next to its weights, from its base, or told by the names and shapes of its
# tensors
ConfigFrom = Literal["folder", "base", "shapes"]
NO_TENSORS: Mapping[str, TensorEntry] = MappingProxyType({})


@dataclass(frozen=True, slots=True, eq=False)
class MovedMean:
    """One vector that inputs are less than they were, in the first of their channels.

    `readers`: the layers that read them, whose biases take it back. `producers`: the tensors that give it away, and
    from which of each one's numbers on.
    """

    readers: tuple[str, ...]
    producers: tuple[tuple[str, int], ...]
    mean: Tensor  # (width,) float32


@dataclass(frozen=True)
class Source:
    """A 16-bit model under diffusers' names.

    `pipeline` is the folder that holds the other components: the model's own, or the base pipeline of a single file;
    None where there is none. `tensors` is empty for a bare config. `companions` are other components (text encoders,
    autoencoder) whose tensors take the place of those in `pipeline`. `scheduler` are the settings that the model needs
    of its pipeline's scheduler, whatever they are there: what it was trained to predict. A pipeline with several
    denoisers is one source: see `source.denoisers` for what their layers are called.
    """

    path: Path
    pipeline: Path | None
    component: str  # of the (first) denoiser: "transformer" or "unet"
    config: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]  # of all denoisers
    companions: Mapping[str, Mapping[str, TensorEntry]] = field(default_factory=dict)
    scheduler: Mapping[str, object] = field(default_factory=dict)
    kind: str = "diffusers folder"  # how the weights were stored, for people
    warnings: tuple[str, ...] = ()
    config_from: ConfigFrom = "folder"
    further: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # other denoisers' configs
    moved: Sequence[MovedMean] = ()  # means that its biases hold
    # the denoiser of each merged LoRA; None where there is one, or the names in the file tell
    merged_into: Sequence[str | None] = ()

    @property
    def components(self) -> tuple[str, ...]:
        """Names of all denoisers, in order."""
        return (self.component, *self.further)

    @property
    def configs(self) -> Mapping[str, Mapping[str, object]]:
        """Configs of all denoisers, by component."""
        return {self.component: self.config, **self.further}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({entry.file for entry in self.tensors.values()}))

    @property
    def file_bytes(self) -> int:
        """Of its files, headers included: the size of a checkpoint, as every report has it."""
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def bytes(self) -> int:
        """Of all tensors once they are read. Counted once: a prediction asks for every layer group."""
        return sum(entry_bytes(entry) for entry in self.tensors.values())


def read_tensor(source: Source, name: str) -> Tensor:
    """One tensor. Raises InputError if its file is damaged or the name is missing. Of any shape, the model's own."""
    return tensor_entry(source, name).read()


def tensor_entry(source: Source, name: str) -> TensorEntry:
    """One tensor, not yet read. Raises InputError if the name is missing."""
    entry = source.tensors.get(name)
    if entry is None:
        raise InputError(
            f"{source.path}: the weights have no tensor {name!r}",
            hint="the checkpoint is incomplete or has a different model class; download it again",
            where=name,
        )
    return entry


def source_digest(source: Source, stop: threading.Event | None = None) -> str:
    """sha256 of the model as it is read: its configs, and the sha256 of every tensor under its diffusers name.

    The same weights have the same digest in whatever file they are stored, under whatever names. CancelledError once
    `stop` is set.
    """
    digest = hashlib.sha256(json.dumps(described_config(source.config), sort_keys=True).encode())
    for component, config in source.further.items():
        said = {component: described_config(config)}
        digest.update(json.dumps(said, sort_keys=True).encode())
    for line in _described(source.tensors, stop):
        digest.update(line)
    return digest.hexdigest()


def tensors_sha256(files: Sequence[Path], stop: threading.Event | None = None) -> str:
    """sha256 of the names, shapes, types and bytes of all tensors in safetensors files, in whatever order and however
    they are spread over the files of one folder. CancelledError once `stop` is set."""
    several = len({file.parent for file in files}) > 1  # denoisers have tensors of equal names
    tensors = {
        f"{file.parent.name}/{name}" if several else name: entry
        for file in files
        for name, entry in read_header(file).items()
    }
    digest = hashlib.sha256()
    for line in _described(tensors, stop):
        digest.update(line)
    return digest.hexdigest()


def _described(tensors: Mapping[str, TensorEntry], stop: threading.Event | None) -> Iterator[bytes]:
    """What a digest takes of every tensor, by name."""
    for (name, entry), content in prefetch(
        sorted(tensors.items()), lambda named: content_sha256(named[1]), threads=_HASHERS
    ):
        if stop is not None and stop.is_set():
            raise CancelledError
        yield f"{name} {entry.dtype} {list(entry.shape)} {content}\n".encode()


def described_config(config: Mapping[str, object]) -> dict[str, object]:
    """What a config says of the model: without diffusers' private notes (version, where it came from)."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
