"""Whether the GEMM's large blocks may be used on a GPU: the result of their trial there, kept in the user's cache.

They are new and few cards have run them. So a card uses them only after `runtime.large_blocks` found that they give the
same bits as the blocks before, and never where they failed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from svdq_cli.gpu import nvrtc
from svdq_cli.gpu.architectures import Architecture
from svdq_cli.gpu.compile import read_headers, read_source
from svdq_cli.storage.atomic import write_text
from svdq_cli.storage.resources import cache_folder

KERNELS = ("w4a4_gemm", "w4a4_gelu_quantize")  # that have large blocks


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial found."""

    sound: bool
    reason: str


def verdict_path(gpu_name: str, kind: Architecture) -> Path:
    """Where a GPU's verdict is. Another card, compiler or source has another one."""
    digest = hashlib.sha256()
    for text in (
        gpu_name,
        kind.target,
        str(nvrtc.version()),
        *map(read_source, KERNELS),
        *(part for pair in read_headers().items() for part in pair),
    ):
        digest.update(text.encode())
        digest.update(b"\0")
    return cache_folder() / "kernels" / f"large-blocks-{kind.target}-{digest.hexdigest()[:24]}.json"


def read_verdict(path: Path) -> Verdict | None:
    """None where there was no trial, or its file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Verdict(found["sound"] is True, str(found["reason"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep_verdict(path: Path, verdict: Verdict) -> None:
    """Where the cache can't be written the trial is repeated next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(verdict)) + "\n", durable=False)
    except OSError:
        pass
    proven_on.cache_clear()


@functools.cache
def proven_on(index: int, kind: Architecture) -> bool:
    """Whether GPU `index` has proven its large blocks. Read once in a process: launches ask for it."""
    found = read_verdict(verdict_path(torch.cuda.get_device_name(index), kind))
    return found is not None and found.sound
