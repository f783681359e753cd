"""The training config of an adapter: peft's adapter_config.json, or what diffusers saves of it in a file's header.

It says by what an adapter is scaled where the file does not, and whether the adapter belongs to the model as it is.
Source of the meaning: peft 0.21 (tuners/lora/layer.py, tuners/lokr/layer.py, utils/other.py).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import regex

from svdq_cli.errors import InputError
from svdq_cli.storage.json_files import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILE = "adapter_model.safetensors"
MERGE_WITH_PEFT = (
    "merge it into the model with peft (merge_and_unload), save that with save_pretrained, and convert it"
)

# How an adapter's training changed the base itself; what is merged has to say so too
ChangedBase = Literal["PiSSA", "OLoRA"]

_READ_TYPES = ("LORA", "LOHA", "LOKR")
_DEFAULT = 8  # peft's rank and alpha where a config says none
_PATTERN_CHARACTERS = 1000  # a pattern may have
_ONE_MATCH = 0.5  # seconds, of one pattern with one name
_ALL_MATCHES = 5.0  # seconds
# init_lora_weights that leave it alone
_SAME_BASE = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_CHANGED_BASE: dict[str, ChangedBase] = {"pissa": "PiSSA", "olora": "OLoRA"}
# Settings under which peft computes something else from the same factors, by the name of the kind
_OTHER_FORWARDS = {
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA, which only acts on some tokens",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "layer_replication": "a LoRA over repeated layers",
    "target_parameters": "a LoRA of bare parameters",
    "trainable_token_indices": "trainable tokens",
    "modules_to_save": "whole layers trained alongside the LoRA (modules_to_save)",
}


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """What a trainer said of an adapter. `prefix`: the component that precedes its names in the file but not in
    the config's patterns."""

    origin: Path
    said: Mapping[str, object]
    prefix: str = ""
    patterns: _Patterns = field(default_factory=lambda: _Patterns())

    @property
    def changed_base(self) -> ChangedBase | None:
        return _CHANGED_BASE.get(self._initialization)

    def scale(self, layer: str, algorithm: str, rank: int | None) -> float:
        """What peft multiplies a layer's factors by: alpha over its rank, or over its root. `rank`: of the factors;
        None where they have none (LoKr of whole matrices), and the config's counts.

        Raises ValueError for an alpha or a rank that is not a number.
        """
        name = layer.removeprefix("base_model.model.").removeprefix(self.prefix)
        word = "lora_alpha" if algorithm == "LoRA" else "alpha"
        alpha = _number(word, self._of_layer("alpha_pattern", name, self.said.get(word, _DEFAULT)))
        divisor = float(rank) if rank is not None else self._rank(name)
        if algorithm == "LoRA" and self.said.get("use_rslora"):
            divisor **= 0.5
        return alpha / divisor

    def _rank(self, name: str) -> float:
        rank = _number("r", self._of_layer("rank_pattern", name, self.said.get("r", _DEFAULT)))
        if rank <= 0:
            raise ValueError(f"r is {rank:g}, but a rank must be above 0")
        return rank

    @property
    def _initialization(self) -> str:
        return str(self.said.get("init_lora_weights", True)).lower()

    def _of_layer(self, word: str, name: str, default: object) -> object:
        """peft's value for one layer: of the first pattern that matches the end of its name."""
        values = self.said.get(word)
        if not isinstance(values, Mapping):
            return default
        for pattern, value in values.items():
            if self.patterns.match(self.origin, word, str(pattern), name):
                return value
        return default

    def require_readable(self) -> None:
        """Raises InputError naming what svdq can't merge: another tuner, or a base that can't be made again."""
        tuner = self.said.get("peft_type", "LORA")
        if tuner not in _READ_TYPES:
            raise self._refused(f"adapter type {tuner}: svdq reads peft's LORA, LOHA and LOKR")
        for word, kind in _OTHER_FORWARDS.items():
            if self.said.get(word):
                raise self._refused(f"{kind} ({word}), which svdq does not merge")
        if tuner == "LORA" and self._initialization not in (*_SAME_BASE, *_CHANGED_BASE):
            raise self._refused(
                f"init_lora_weights is {self.said.get('init_lora_weights')!r}: the adapter belongs to a base that its "
                "training changed, in a way that can't be made again from the model"
            )

    def _refused(self, why: str) -> InputError:
        return InputError(f"{self.origin}: {why}", hint=MERGE_WITH_PEFT, where=str(self.origin), kind="lora")


def config_beside(file: Path, *, named_by_peft: bool) -> TrainingConfig | None:
    """The adapter_config.json in a weight file's folder. It is known to be that file's where the file has peft's name,
    or its tensors have peft's prefix."""
    config = file.parent / CONFIG_FILE
    if (file.name == WEIGHT_FILE or named_by_peft) and config.is_file():
        return TrainingConfig(config, read_json(config))
    return None


def config_in_header(file: Path, metadata: Mapping[str, str]) -> TrainingConfig | None:
    """The training config that diffusers saves in a LoRA's header, of the denoiser alone."""
    try:
        saved = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(saved, dict):
        return None
    for prefix in ("transformer.", "unet."):
        said = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
        if said:
            return TrainingConfig(file, said, prefix)
    return TrainingConfig(file, saved) if saved else None


def alpha_of_all_layers(file: Path, metadata: Mapping[str, str]) -> TrainingConfig | None:
    """The one `alpha` that a file's header gives for all its layers; None where it gives none that is a number."""
    try:
        alpha = float(metadata.get("alpha", "nan"))
    except ValueError:
        return None
    return TrainingConfig(file, {"lora_alpha": alpha, "alpha": alpha}) if math.isfinite(alpha) else None


@dataclass(slots=True)
class _Patterns:
    """Patterns of a config, matched as peft does: `(.*\\.)?(PATTERN)$` from the name's start. A pattern is a stranger's
    program; what it may cost is bounded."""

    compiled: dict[str, regex.Pattern[str] | None] = field(default_factory=dict)  # None: a name, no program
    spent: float = 0.0  # seconds

    def match(self, origin: Path, word: str, pattern: str, name: str) -> bool:
        """Raises InputError for a pattern that is none, or that takes too long."""
        if pattern not in self.compiled:
            self.compiled[pattern] = _compiled(origin, word, pattern)
        program = self.compiled[pattern]
        if program is None:
            return _is_end(pattern, name)
        started = time.monotonic()
        try:
            found = program.match(name, timeout=_ONE_MATCH) is not None
        except TimeoutError as error:
            raise _too_long(origin, word, pattern) from error
        self.spent += time.monotonic() - started
        if self.spent > _ALL_MATCHES:
            raise _too_long(origin, word, pattern)
        return found


def _compiled(origin: Path, word: str, pattern: str) -> regex.Pattern[str] | None:
    if len(pattern) > _PATTERN_CHARACTERS:
        raise _too_long(origin, word, pattern)
    if re.fullmatch(r"[\w.-]*", pattern):
        return None
    try:
        # peft's own engine has to take it too; `regex` reads the same language, and can be told to stop
        re.compile(rf"(.*\.)?({pattern})$")
        return regex.compile(rf"(.*\.)?({pattern})$")
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"{origin}: {word}: {pattern!r} is not a regular expression: {error}",
            hint="restore the config file that the trainer wrote",
            where=str(origin),
            kind="lora",
        ) from error


def _is_end(pattern: str, name: str) -> bool:
    """What a pattern of name characters matches, of which only the dot is special."""
    start = len(name) - len(pattern)
    if start < 0 or (start > 0 and name[start - 1] != "."):
        return False
    return all(want in (".", found) for want, found in zip(pattern, name[start:], strict=True))


def _number(word: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{word} is {str(value)[:40]}, not a number")
    return number


def _too_long(origin: Path, word: str, pattern: str) -> InputError:
    shown = pattern if len(pattern) <= 60 else pattern[:57] + "..."
    return InputError(
        f"{origin}: {word}: {shown!r} takes too long to match against the layers' names",
        hint="write the layers' names instead of the expression",
        where=str(origin),
        kind="lora",
    )
