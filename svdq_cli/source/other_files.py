"""Single files that are no diffusion model: what they are, told by their keys, and what to do with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.errors import InputError


@dataclass(frozen=True, slots=True)
class OtherFile:
    """A kind of file. `pattern` is found in some key of every such file, and of no diffusion model."""

    name: str
    pattern: re.Pattern[str]
    hint: str


_PART = "give the diffusion model; this file's place is in the pipeline folder that --base names"
OTHER_FILES = (
    OtherFile(
        "a LoRA",
        re.compile(
            r"[._]lora\d?[._](A|B|up|down)\b|\.lora_linear_layer\.|\.hada_w1_a|\.lokr_w1|\.oft_blocks"
        ),
        "give the model that it belongs to, and this file with --lora FILE:WEIGHT",
    ),
    OtherFile(
        "an autoencoder (VAE)",
        re.compile(r"^(vae\.|first_stage_model\.)?decoder\.(conv_in|conv1|middle|project_in)\."),
        _PART,
    ),
    OtherFile(
        "a text encoder",
        re.compile(r"^(encoder\.block\.0\.layer\.|(text_model\.)?embeddings\.token_|model\.embed_tokens\.)"),
        _PART,
    ),
    OtherFile(
        "a ControlNet",
        re.compile(r"^(control_model\.|controlnet_|controlnet\.|input_hint_block\.)"),
        "svdq converts the model that it steers, not the ControlNet",
    ),
)


def refuse_other_files(path: Path, names: Iterable[str]) -> None:
    """InputError that says what the file is."""
    found = list(names)
    for kind in OTHER_FILES:
        if name := next((name for name in found if kind.pattern.search(name)), None):
            raise InputError(
                f"{path}: {kind.name}, not a diffusion model; it holds {name}",
                hint=kind.hint,
                where=str(path),
                kind="unknown-family",
            )
