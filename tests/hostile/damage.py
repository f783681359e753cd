"""Ways to damage a pipeline or to write what is none. Each changes the folder that holds the pipeline as `flux/`."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"
LINEAR = "transformer_blocks.0.attn.to_q.weight"
EVIL = "\x1b[2J\x1b]0;owned\x07"  # clears a terminal and sets its title
MINIMAL = "version: 1\nmodel: {source: demo}\n"


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Rewrites the header of the weights; the bytes behind it stay."""

    def damage(here: Path) -> None:
        path = here / "flux" / WEIGHTS
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])
        changed = change(found)
        text = changed if isinstance(changed, bytes) else json.dumps(found).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def entry(key: str, value: object) -> Damage:
    """One fact of one tensor's header entry."""
    return header(lambda found: found[LINEAR].update({key: value}))


def raw(path: str, content: bytes) -> Damage:
    """Puts a file there, in the place of what is."""

    def damage(here: Path) -> None:
        (here / path).unlink(missing_ok=True)
        (here / path).write_bytes(content)

    return damage


def folder(path: str) -> Damage:
    """Puts an empty folder there, in the place of a file."""

    def damage(here: Path) -> None:
        (here / path).unlink(missing_ok=True)
        (here / path).mkdir()

    return damage


def nothing(here: Path) -> None:
    """The input is whole; the words are what is wrong."""


def tensor(change: Callable[[torch.Tensor], torch.Tensor], name: str = LINEAR) -> Damage:
    def damage(here: Path) -> None:
        path = here / "flux" / WEIGHTS
        tensors = load_file(path)
        save_file({**tensors, name: change(tensors[name])}, path)

    return damage


def filled(value: float) -> Damage:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = value
        return weight

    return tensor(change)


def js(path: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Changes a JSON object in a file; what `change` returns, if anything, is written instead."""

    def damage(here: Path) -> None:
        found = json.loads((here / path).read_text())
        (here / path).write_text(json.dumps(change(found) or found))

    return damage


def recipe(text: str) -> Damage:
    return raw("recipe.yaml", text.encode())


def rule(pattern: str) -> Damage:
    """A recipe whose layer rule has this pattern."""
    return recipe(f"{MINIMAL}layers: [{{match: '{pattern}', rank: 16}}]\n")


def linked(path: str, target: str) -> Damage:
    def damage(here: Path) -> None:
        (here / path).parent.mkdir(exist_ok=True)
        (here / path).symlink_to(target)

    return damage


def huge_header(here: Path) -> None:
    """100 MB of JSON that is no safetensors header, in a file that takes no disk."""
    with (here / "flux" / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000) + b'{"a":')
        file.truncate(99_000_008)


def sparse_header(here: Path) -> None:
    with (here / "flux" / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate((1 << 40) + 8)


def swapped(found: dict[str, Any]) -> None:
    """Two tensors of one size on the same bytes: the file is as long as it says, and one hides the other's gap."""
    found[LINEAR]["data_offsets"] = found[LINEAR.replace("to_q", "to_k")]["data_offsets"]


def twice(found: dict[str, Any]) -> bytes:
    text = json.dumps(found)
    return (text[:-1] + f", {json.dumps(LINEAR)}: {json.dumps(found[LINEAR])}}}").encode()


def pickled_shards(here: Path) -> None:
    (here / "flux" / WEIGHTS).unlink()
    (here / "flux/transformer/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}, protocol=2))


def zipped_pickle(here: Path) -> None:
    (here / "flux" / WEIGHTS).unlink()
    with zipfile.ZipFile(here / "flux" / WEIGHTS, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps([1], protocol=2))


def pipe_in_a_component(here: Path) -> None:
    os.mkfifo(here / "flux/text_encoder/notes.txt")


def socket_in_a_component(here: Path) -> None:
    place = here / "flux/vae/s"
    with socket.socket(socket.AF_UNIX) as opened:
        old = Path.cwd()
        os.chdir(place.parent)  # a socket's address is short
        try:
            opened.bind("s")
        finally:
            os.chdir(old)


def longer(here: Path) -> None:
    with (here / "flux" / WEIGHTS).open("ab") as file:
        file.write(b"x")


def diary(here: Path) -> None:
    """A folder of someone's own."""
    (here / "keep").mkdir()
    (here / "keep/diary.txt").write_text("dear")


def prompts(content: bytes) -> Damage:
    return raw("prompts.txt", content)
