"""Saving a loaded model: the checkpoint's own files, byte for byte, or a refusal before a file is touched.

What runs is not what is stored: layers were unpacked for a backend, and diffusers would write that, without the
`quantization_config` that says what it is. So `save_pretrained` copies what the model was loaded from. Where that is
no longer what runs (LoRAs, changed weights), nothing is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from svdq_cli.checkpoint.reader import Checkpoint, open_checkpoint
from svdq_cli.checkpoint.writer import WEIGHT_FILE
from svdq_cli.errors import InputError, UsageError
from svdq_cli.sampling import SAMPLING_FILE
from svdq_cli.storage.atomic import disk_errors, whole_file
from svdq_cli.storage.output_paths import REPORT_FILE

ORIGIN = "svdq_origin"  # attribute of a loaded model: its `Origin`
MEANS = "svdq_means"  # attribute of a loaded model: by layer, what its input is less than the 16-bit model's
LORAS = "svdq_loras"  # attribute of a loaded model: its LoRAs (`lora.attaching`)
_WEIGHTS = WEIGHT_FILE.removesuffix(".safetensors")
_PAPERS = (REPORT_FILE, SAMPLING_FILE, "README.md", "LICENSE*")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that a model was loaded from, as it was then."""

    path: Path  # as the user named it: a pipeline's or a component's folder, or a file
    folder: Path | None  # of the component; None for a single file
    format: str
    parameters: int  # of the 16-bit model
    stamps: tuple[tuple[Path, int, int], ...]  # of the weight files: size, time of the last change

    @classmethod
    def of(cls, checkpoint: Checkpoint, path: Path) -> Origin:
        """`path`: what the checkpoint was opened by."""
        source = checkpoint.source
        folder = None if checkpoint.format.single_file else source.files[0].absolute().parent
        stamps = tuple(_stamp(file.absolute()) for file in source.files)
        return cls(path.absolute(), folder, checkpoint.format.name, checkpoint.parameters, stamps)


def save_model(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    use_flashpack: bool = False,
    push_to_hub: bool = False,
    **_: object,
) -> None:
    """`save_pretrained` of a converted model: the component's stored files into a folder.

    How many shards there are is as stored. UsageError as in `require_saveable`, and for `push_to_hub`.
    """
    origin = require_saveable(
        model, safe_serialization=safe_serialization, variant=variant, use_flashpack=use_flashpack
    )
    if push_to_hub:
        raise UsageError(
            "save_pretrained does not upload a 4-bit model",
            hint="call its push_to_hub, or svdq push CKPT owner/name, which uploads the model card as well",
        )
    if is_main_process:
        assert origin.folder is not None
        copy_component(origin.folder, _folder_of(save_directory))


def require_saveable(
    model: nn.Module,
    *,
    safe_serialization: bool = True,
    variant: str | None = None,
    use_flashpack: bool = False,
) -> Origin:
    """UsageError or InputError where what the model was loaded from is not there, not what runs, or not what is asked
    for."""
    origin = cast("Origin", getattr(model, ORIGIN))
    if not safe_serialization or use_flashpack or variant is not None:
        raise UsageError(
            "a 4-bit model is saved as it is stored: safetensors, without variants",
            hint="leave safe_serialization, use_flashpack and variant out",
        )
    _require_no_loras(model, origin)
    if origin.folder is None:
        raise UsageError(
            f"{origin.path}: a single file of format {origin.format}, not a folder that diffusers loads",
            hint=f"svdq export {origin.path} --to nunchaku-lite --base PIPELINE -o FOLDER writes one",
            where=str(origin.path),
        )
    for stamp in origin.stamps:
        _require_unchanged_file(stamp)
    for denoiser in open_checkpoint(origin.path).denoisers:
        if denoiser.source.files[0].absolute().parent == origin.folder:
            _require_unchanged_weights(model, denoiser)
    return origin


def copy_component(source: Path, target: Path) -> None:
    """A component's config and weights, whole or not at all; existing weights of another model are
    removed.

    Does nothing where `target` is `source`.
    """
    names = [file.name for file in source.iterdir() if file.is_file()]
    with disk_errors(target, option="save_pretrained"):
        target.mkdir(parents=True, exist_ok=True)
        if target.samefile(source):
            return
        # all are copied before the first gets its name
        with ExitStack() as together:
            for name in names:
                shutil.copyfile(source / name, together.enter_context(whole_file(target / name)))
        for other in target.glob(f"{_WEIGHTS}*"):
            if other.name not in names:
                other.unlink()


def copy_papers(origin: Origin, target: Path) -> None:
    """The report, the model card and the licence of a checkpoint's folder, into a copy of it."""
    with disk_errors(target, option="save_pretrained"):
        target.mkdir(parents=True, exist_ok=True)
        if not origin.path.is_dir() or target.samefile(origin.path):
            return
        for paper in (found for pattern in _PAPERS for found in origin.path.glob(pattern)):
            with whole_file(target / paper.name) as partial:
                shutil.copyfile(paper, partial)


def _folder_of(save_directory: str | os.PathLike[str]) -> Path:
    folder = Path(save_directory)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file, not a folder", hint="name a folder", where=str(folder))
    return folder


def _require_no_loras(model: nn.Module, origin: Origin) -> None:
    strengths: Mapping[str, float] = getattr(getattr(model, LORAS, None), "strengths", {})
    if active := {name: value for name, value in strengths.items() if value != 0}:
        named = ", ".join(f"{name} at {value:g}" for name, value in active.items())
        raise UsageError(
            f"LoRAs are active on this model ({named}), but the stored model has none",
            hint=f"svdq lora {origin.path} --lora FILE:WEIGHT -o OUT writes a checkpoint with them; "
            "svdq_cli.set_adapters(pipe, {}) turns them off",
        )


def _stamp(file: Path) -> tuple[Path, int, int]:
    found = file.stat()
    return file, found.st_size, found.st_mtime_ns


def _require_unchanged_file(stamp: tuple[Path, int, int]) -> None:
    file = stamp[0]
    if not file.is_file() or _stamp(file) != stamp:
        raise InputError(
            f"{file}: {'changed' if file.is_file() else 'gone'} since the model was loaded from it",
            hint="load the pipeline again, and save that",
            where=str(file),
        )


def _require_unchanged_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Compare the stored 16-bit tensors with those in use. A conversion of dtypes is not a change."""
    running = dict(model.state_dict(keep_vars=True))
    for name in checkpoint.kept_names():
        tensor = running.get(name)
        if tensor is None or tensor.is_meta:  # offloaded: hooks keep it, and no one writes into it
            continue
        if not _same_numbers(tensor.detach(), checkpoint.kept_tensor(name)):
            raise UsageError(
                f"{name} was changed since it was loaded from {checkpoint.source.path}",
                hint="change the 16-bit model and convert it",
                where=name,
            )


def _same_numbers(tensor: Tensor, stored: Tensor) -> bool:
    """Whether one is the other, converted once or twice."""
    found = tensor.cpu()
    if found.shape != stored.shape:
        return False
    return any(torch.equal(found, stored.to(between).to(found.dtype)) for between in (stored.dtype, *_DTYPES))
