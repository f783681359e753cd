"""Which part of a file is the diffusion model: the names below a prefix, or below several that wrappers left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from svdq_cli.source.markers import MARKER_KEYS
from svdq_cli.source.names import claim
from svdq_cli.source.tensors import TensorEntry

Entry = TypeVar("Entry", bound=TensorEntry)

# What a model is called where it is saved inside of something: ComfyUI and LDM (`model.diffusion_model.`), pipelines
# (`transformer.`), DistributedDataParallel (`module.`), Lightning (`model.`), peft (`base_model.model.`), trainers.
WRAPPERS = frozenset(
    (
        *("model", "diffusion_model", "transformer", "unet", "denoiser", "dit"),
        *("module", "net", "pipe", "pipeline", "base_model", "state_dict"),
    )
)
_MOST_WRAPPERS = 6  # around one another
# What torch.compile, FSDP and activation checkpointing put into names, above the model and inside of it
TRANSPARENT = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


@dataclass(frozen=True, slots=True)
class ModelPart(Generic[Entry]):
    """The diffusion model inside a file, by names without their prefix, and the file's other tensors by names without
    the wrappers that they share with it."""

    prefix: str
    tensors: Mapping[str, Entry]
    rest: Mapping[str, Entry]


def find_model(
    stored: Mapping[str, Entry],
    signatures: Iterable[Collection[str]],
    known_names: Callable[[], Collection[str]] = tuple,
    beside: tuple[str, ...] = (),
) -> ModelPart[Entry]:
    """The part of a file that is the diffusion model.

    `signatures` are names that tell a model each, in the order of their weight: where one is whole below a prefix, that
    is it. Else it is the prefix below which most of `known_names` are stored or, where none does, most tensors.
    `beside` are prefixes of what is never the model's. Raises InputError (kind `claimed-twice`) where two keys of the
    file represent one tensor; a marker may be there twice.
    """
    names: dict[str, Entry] = {}
    for key, entry in stored.items():
        claim(names, _without_transparent(key), entry)
    signatures = tuple(signatures)
    prefix = _by_signature(names, signatures)
    if prefix is None:
        prefix = _by_known_names(names, set(known_names()))
    if prefix is None:
        wrappings = Counter(prefix for name in names for prefix in _wrappings(name))
        prefix = max(wrappings, key=lambda prefix: (wrappings[prefix], len(prefix)), default="")
    tensors: dict[str, Entry] = {}
    rest: dict[str, Entry] = {}
    for name, entry in names.items():
        if name.startswith(prefix) and not name.removeprefix(prefix).startswith(beside or ("\0",)):
            tensors[name.removeprefix(prefix)] = entry
        else:
            # What is stored next to the model is wrapped as the model is, by all wrappers but the model's own
            shared = next((wrappers for wrappers in _wrappings(name) if prefix.startswith(wrappers)), "")
            inner = name.removeprefix(shared)
            rest[name if inner in rest else inner] = entry
    for name, entry in rest.items():
        # A second model, or parts of one, below another wrapper: it is impossible to tell which of the two is meant.
        for other in (*_wrappings(name), ""):
            if (inner := name.removeprefix(other)) in tensors and inner not in MARKER_KEYS:
                claim(tensors, inner, entry)
    _refuse_second_inside(tensors, signatures)
    return ModelPart(prefix, tensors, rest)


def _refuse_second_inside(tensors: dict[str, Entry], signatures: Iterable[Collection[str]]) -> None:
    """Raises InputError where a whole model is below a wrapper next to the bare names of another."""
    wrapped = {name: entry for name, entry in tensors.items() if _wrappings(name)}
    if second := _by_signature(wrapped, signatures):
        for name, entry in wrapped.items():
            if (inner := name.removeprefix(second)) in tensors and inner != name:
                claim(tensors, inner, entry)


def is_wrapped(key: str) -> bool:
    """Whether a stored key has a wrapper's name before it or inside of it."""
    return bool(_wrappings(key)) or _without_transparent(key) != key


def _without_transparent(key: str) -> str:
    if "_orig_mod" not in key and "_wrapped_module" not in key:
        return key
    return ".".join(part for part in key.split(".") if part not in TRANSPARENT)


def _wrappings(name: str) -> tuple[str, ...]:
    """Every run of wrappers that a name begins with, the longest first: "model.diffusion_model.", "model."."""
    found: list[str] = []
    end = 0
    for part in name.split(".", _MOST_WRAPPERS)[:_MOST_WRAPPERS]:
        end += len(part) + 1
        if part not in WRAPPERS or end > len(name):
            break
        found.append(name[:end])
    return tuple(reversed(found))


def _by_signature(names: Mapping[str, object], signatures: Iterable[Collection[str]]) -> str | None:
    for signature in signatures:
        known = min(signature)
        for name in names:
            prefix = name.removesuffix(known)
            if not name.endswith(known) or (prefix and prefix not in _wrappings(name)):
                continue
            if all(prefix + other in names for other in signature):
                return prefix
    return None


def _by_known_names(names: Iterable[str], known: Collection[str]) -> str | None:
    found = Counter(
        prefix for name in names for prefix in (*_wrappings(name), "") if name.removeprefix(prefix) in known
    )
    return max(found, key=lambda prefix: found[prefix], default=None)
