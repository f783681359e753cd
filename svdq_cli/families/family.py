"""What svdq knows of a model family, as data: names and patterns, never code.

Layer names in a `BlockRule` are relative to one block and exact. `keep` holds `fnmatch` patterns of full module paths.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InputRule:
    """Layers of one block that read the same activation. `branches`: which of them share a down projection."""

    layers: tuple[str, ...]
    branches: tuple[tuple[str, ...], ...]


def alone(name: str) -> InputRule:
    """A layer that shares its input with no other."""
    return InputRule((name,), ((name,),))


def together(*names: str) -> InputRule:
    """Layers with one input that runtimes may fuse into one matrix: one smoothing factor, one down projection."""
    return InputRule(names, (names,))


@dataclass(frozen=True, slots=True)
class BlockRule:
    """One stack of repeated blocks: `stack` is the ModuleList's path."""

    stack: str
    w4a4: tuple[InputRule, ...]
    w4a16: tuple[str, ...]  # modulation linears, all fed by the same conditioning vector


@dataclass(frozen=True, slots=True)
class Family:
    """One model family. Every linear must be named by a block rule or matched by `keep`."""

    name: str
    classes: tuple[str, ...]  # diffusers class names (`_class_name` in config.json)
    config_signature: frozenset[str]  # config keys that give the class away where `_class_name` is missing
    component: str  # the pipeline's folder that holds the model
    blocks: tuple[BlockRule, ...]
    keep: tuple[str, ...]
