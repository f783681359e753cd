"""The keys of an adapter file: which layer each belongs to, and what it is of that layer's adapter.

Kinds of adapters whose changes svdq can't compute are refused by their own names here, before a number is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from svdq_cli.errors import InputError, Kind
from svdq_cli.source.tensors import StoredTensor, is_finite
from svdq_cli.source.upconverted import FLOAT8

_MERGE_ELSEWHERE = "merge it into the model with the tool that trained it, and convert the result"
_DAMAGED = "the file is damaged; download it again"

# What follows a layer's name: peft, diffusers' older attention processors and their `lora_layer`s, kohya, LyCORIS
_ROLES = {
    "down": re.compile(
        r"(?:\.lora_A(?:\.\w+)?|[._]lora\d?\.down|\.lora_linear_layer\.down|\.lora_down)\.weight$"
    ),
    "up": re.compile(r"(?:\.lora_B(?:\.\w+)?|[._]lora\d?\.up|\.lora_linear_layer\.up|\.lora_up)\.weight$"),
    "bias": re.compile(r"(?:\.lora_B(?:\.\w+)?|\.lora_up)\.bias$"),
    # the core of a convolution's Tucker decomposition, between the two
    "mid": re.compile(r"\.lora_mid\.weight$"),
    "alpha": re.compile(r"\.(?:lora_)?alpha$"),
    "magnitude": re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)??(?:\.weight)?)$"),
    **{
        f"{algorithm}_{part}": re.compile(rf"\.{algorithm}_{part}(?:\.default)?$")
        for algorithm, parts in (
            ("hada", ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            ("lokr", ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        )
        for part in parts
    },
    # What was trained itself: LyCORIS' "full" and its norms, ComfyUI's extracted differences
    "difference": re.compile(r"\.(?:diff|w_norm)$"),
    "bias_difference": re.compile(r"\.(?:diff_b|b_norm)$"),
}
MATRICES = ("down", "mid", "up", *(role for role in _ROLES if role.startswith(("hada_", "lokr_"))))
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

# Adapters that svdq does not merge. Each changes weights in a way of its own.
_OTHER_KINDS = {
    "OFT or BOFT": re.compile(r"\.oft_(?:blocks|diag)\b"),
    "OFT": re.compile(r"\.oft_(?:R|embedding_R)\b"),
    "BOFT": re.compile(r"\.boft_"),
    "GLoRA": re.compile(r"\.(?:[ab][12]\.weight|bm\.weight|glora_)"),
    "(IA)^3": re.compile(r"\.(?:ia3_l|on_input)\b"),
    "T-LoRA": re.compile(r"\.(?:[qp]_layer\.weight|lambda_layer)$"),
    "LoKr with a Tucker core of its first factor": re.compile(r"\.lokr_t1\b"),
    "AdaLoRA": re.compile(r"\.lora_E\b|\.ranknum\b"),
    "VeLoRA": re.compile(r"\.lora_velora_"),
    "MonteCLoRA": re.compile(r"\.lora_monteclora"),
    "Arrow": re.compile(r"\.lora_arrow"),
    "KaSA": re.compile(r"\.lora_diag\b"),
    "a LoRA of embeddings": re.compile(r"\.lora_embedding_[AB]\b"),
    "Stability's control LoRA": re.compile(r"^lora_controlnet$"),
    "a LoRA in Nunchaku's own form, made from another file": re.compile(r"\.lora_(?:down|up)$"),
    "a LoRA in 8-bit floats with scales": re.compile(
        r"\.lora_(?:down|up|A|B)\.(?:weight_scale|scale_weight)$"
    ),
    "a difference of modulation tables": re.compile(r"\.modulation\.diff$"),
    "whole tensors that replace the model's own": re.compile(r"\.set_weight$"),
    "a control LoRA, which widens an input": re.compile(r"\.reshape_weight$"),
    # peft's other tuners, by the prefix that their parameters have
    **{
        name: re.compile(rf"\.{prefix}_")
        for name, prefix in (
            ("AdaMSS", "adamss"),
            ("BEFT", "beft"),
            ("C3A", "c3a"),
            ("DEFT", "deft"),
            ("DeLoRA", "delora"),
            ("FourierFT", "fourierft"),
            ("FRoD", "frod"),
            ("GraLoRA", "gralora"),
            ("HiRA", "hira"),
            ("HRA", "hra"),
            ("Lily", "lily"),
            ("LN tuning", "ln_tuning"),
            ("MiSS", "miss"),
            ("Bone", "bone"),
            ("OSF", "osf"),
            ("PEANuT", "peanut"),
            ("Poly", "poly"),
            ("PSOFT", "psoft"),
            ("PVeRA", "pvera"),
            ("RandLoRA", "randlora"),
            ("RoAd", "road"),
            ("SHiRA", "shira"),
            ("SuperTuning", "supertuning"),
            ("TinyLoRA", "tinylora"),
            ("trainable tokens", "trainable_tokens"),
            ("Uni-LoRA", "unilora"),
            ("VB-LoRA", "vblora"),
            ("VeRA", "vera"),
            ("WaveFT", "waveft"),
            ("X-LoRA", "xlora"),
        )
    },
}
_FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
_INTEGERS = ("I64", "I32", "I16", "I8", "U8")  # some trainers store an alpha as the whole number that it is
# A tensor's own name in a model, which an adapter file has where a trainer saved it whole
_WHOLE = re.compile(r"\.(?:weight|bias|scale|scale_weight|weight_scale)$|(?:^|\.)scaled_fp8$")


@dataclass(slots=True)
class AdapterModule:
    """One layer of an adapter file, as its keys come in."""

    name: str
    # by role: down, up, alpha, ...
    keys: dict[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])

    @property
    def algorithm(self) -> str | None:
        """LoRA, LoHa or LoKr, by the factors that are there; None where they are missing or not whole."""
        roles = self.keys.keys()
        if {"down", "up"} <= roles:
            return "LoRA"
        if roles >= set(_LOHA) and ("hada_t1" in roles) == ("hada_t2" in roles):
            return "LoHa"
        if "lokr_t2" in roles and "lokr_w2" in roles:
            return None
        if all(f"lokr_{w}" in roles or {f"lokr_{w}_a", f"lokr_{w}_b"} <= roles for w in ("w1", "w2")):
            return "LoKr"
        return None

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing: of factors all or none, and at least one thing that is added."""
        if self.algorithm is not None:
            return "difference" not in self.keys
        factors = [role for role in self.keys if role in (*MATRICES, "bias", "magnitude")]
        return not factors and not {"difference", "bias_difference"}.isdisjoint(self.keys)

    @property
    def is_peft_s(self) -> bool:
        """Whether its names are those of peft, whose files say no alpha."""
        factors = [entry.origin for role, entry in self.keys.items() if role in MATRICES]
        return any(".lora_A" in key or self.algorithm in ("LoHa", "LoKr") for key in factors)

    def read(self, role: str) -> Tensor:
        """A tensor as it is stored; 8-bit floats, which torch computes little with, as float32. Of the shape that it
        has in the file: factors are (R, K) and (N, R), whole matrices (N, K)."""
        found = self.keys[role].read()
        return found.float() if found.is_floating_point() and found.itemsize == 1 else found

    def matrix(self, role: str) -> Tensor:
        """The entry as a matrix: a convolution's (N, C, H, W) is (N, C * H * W)."""
        return self.read(role).flatten(1)

    def is_zero(self) -> bool:
        """Whether one of the factors, of whose product the change is made, has no number but 0."""
        factors = [role for role in self.keys if role in MATRICES]
        return bool(factors) and any(not bool(self.read(role).any()) for role in factors)


def refuse_other_kinds(file: Path, keys: Mapping[str, object]) -> None:
    """Raises InputError naming the kind, where a key is of an adapter that svdq does not merge."""
    for kind, pattern in _OTHER_KINDS.items():
        found = next((key for key in keys if pattern.search(key)), None)
        if found is not None:
            raise refused(
                file,
                f"{found}: {kind}: svdq reads LoRA, DoRA, LoHa, LoKr and whole differences",
                _MERGE_ELSEWHERE,
                found,
            )


def modules_of(file: Path, keys: Mapping[str, StoredTensor]) -> tuple[list[AdapterModule], list[str]]:
    """Keys by layer, and those that are no part of an adapter. Raises InputError for two keys that say the same of a
    layer."""
    modules: dict[str, AdapterModule] = {}
    foreign: list[str] = []
    for key, entry in keys.items():
        role, name = _role(key)
        if role is None:
            foreign.append(key)
            continue
        known = modules.setdefault(name, AdapterModule(name)).keys
        if role in known:
            raise twice(file, known[role].origin, entry.origin, f"the same part of {name}")
        known[role] = entry
    return list(modules.values()), foreign


def require_whole(file: Path, modules: Sequence[AdapterModule], foreign: list[str]) -> None:
    """Raises InputError for keys that are no part of an adapter, layers that lack a half, and a file without any."""
    if foreign:
        raise _foreign(file, foreign, alone=not modules)
    halves = [module.name for module in modules if not module.is_whole]
    if halves:
        raise refused(
            file, f"layers have only half of their LoRA: {some(halves)}", "download it again", halves[0]
        )
    if not modules:
        raise refused(file, "holds no LoRA for the diffusion model", "give a LoRA of this model", str(file))


def require_numbers(file: Path, module: AdapterModule) -> None:
    """Raises InputError for a tensor of a layer that is empty, no matrix where one is needed, or not finite."""
    for role, entry in module.keys.items():
        if entry.dtype not in _FLOATS and not (role == "alpha" and entry.dtype in _INTEGERS):
            raise refused(
                file,
                f"{module.name}: {entry.origin} is stored as {entry.dtype}, but svdq reads adapters of 8- to "
                "64-bit floats",
                "get the adapter as it was trained",
                module.name,
            )
        if math.prod(entry.shape) == 0:
            raise refused(
                file,
                f"{module.name}: {entry.origin} is empty, of shape {list(entry.shape)}: a LoRA of rank 0",
                _DAMAGED,
                module.name,
            )
        if role in MATRICES and len(entry.shape) < 2:
            raise refused(
                file,
                f"{module.name}: {entry.origin} has shape {list(entry.shape)}, but a factor must be a matrix",
                _DAMAGED,
                module.name,
            )
        if not is_finite(module.read(role)):
            raise refused(
                file,
                f"{module.name} holds NaN or infinite values",
                "use another LoRA",
                module.name,
                "not-finite",
            )


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def twice(file: Path, first: str, second: str, what: str) -> InputError:
    return refused(
        file,
        f"{first} and {second} are both present, and both are {what}",
        "keep one of the two: svdq can't tell which one applies",
        second,
    )


def refused(file: Path, why: str, hint: str, where: str, kind: Kind = "lora") -> InputError:
    return InputError(f"{file}: {why}", hint=hint, where=where, kind=kind)


def _role(key: str) -> tuple[str | None, str]:
    """What a key is of its layer (down, up, alpha), and the layer's name."""
    for role, pattern in _ROLES.items():
        if found := pattern.search(key):
            # `to_q_lora.down`, `qkv_lora1.down`: the processor's name for its adapter, without the ending
            suffix = re.match(r"_lora\d?", found[0])
            return role, key[: found.start()] + (suffix[0] if suffix and suffix[0][-1].isdigit() else "")
    return None, key


def _foreign(file: Path, keys: list[str], *, alone: bool) -> InputError:
    """The refusal of keys that are no part of an adapter; `alone`: the file has no others."""
    if alone and all(_WHOLE.search(key) for key in keys):
        return refused(
            file,
            f"its {len(keys)} keys are whole tensors of a model, not a LoRA: {some(keys)}",
            "give a model as the source, not as --lora",
            keys[0],
        )
    if all(_WHOLE.search(key) for key in keys):
        return refused(
            file,
            f"{len(keys)} keys are whole tensors of the model, which were trained alongside the LoRA (peft's "
            f"modules_to_save or bias, the norms of a control LoRA): {some(keys)}",
            _MERGE_ELSEWHERE,
            keys[0],
        )
    return refused(
        file,
        f"{len(keys)} keys are not part of a LoRA: {some(keys)}",
        "svdq knows the names of peft, diffusers, kohya, LyCORIS, BFL, ComfyUI, XLabs and cloneofsimo",
        keys[0],
    )
