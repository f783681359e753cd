"""What svdq knows of a model family, as data: names and patterns, never code.

Layer names in a `BlockRule` are relative to one block and exact. `keep` holds `fnmatch` patterns of full module paths.
A 1x1 convolution is a linear layer over channels, and is named like one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class InputRule:
    """Layers of one block that read the same activation. `branches`: which of them share a down projection.

    `optional`: some blocks or variants of the family lack all of these layers (never only some of them).
    """

    layers: tuple[str, ...]
    branches: tuple[tuple[str, ...], ...]
    optional: bool = False


def alone(name: str, *, optional: bool = False) -> InputRule:
    """A layer that shares its input with no other."""
    return InputRule((name,), ((name,),), optional)


def together(*names: str, optional: bool = False) -> InputRule:
    """Layers with one input that runtimes may fuse into one matrix: one smoothing factor, one down projection."""
    return InputRule(names, (names,), optional)


@dataclass(frozen=True, slots=True)
class Producer:
    """A tensor that adds the same numbers to every row of an activation: a bias, or the shift of a modulation.

    `pieces`: by how many times the activation's width the tensor holds, which of these pieces it is ({6: 0}: of six
    the first).
    """

    tensor: str  # relative to the block
    pieces: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class MeanRule:
    """An input whose mean can move into biases: every producer gives it away, and every reader takes it back.

    `inputs`: what each of the inputs is read by, all readers of each; they all move by one vector. `first`: the
    producers give only the first of the readers' columns.
    """

    inputs: tuple[tuple[str, ...], ...]
    producers: tuple[Producer, ...]
    first: bool = False


def modulated(*readers: str, by: str, pieces: Mapping[int, int]) -> MeanRule:
    """An input that a modulation shifts."""
    return MeanRule((readers,), (Producer(by, pieces),))


def attended(*readers: str, values: tuple[str, ...], first: bool = False) -> MeanRule:
    """What softmax attention gives: its weights add up to 1, so it moves by what all values move by. `readers`: the
    layer that reads it, one for each stream."""
    inputs = tuple((reader,) for reader in readers)
    return MeanRule(inputs, tuple(Producer(f"{value}.bias", {1: 0}) for value in values), first)


@dataclass(frozen=True, slots=True)
class BlockRule:
    """One stack of repeated blocks: `stack` is the path of its ModuleList, in which `*` matches one path part."""

    stack: str
    w4a4: tuple[InputRule, ...]
    w4a16: tuple[
        str, ...
    ] = ()  # modulation linears; one name reads the same conditioning vector in every block
    optional: bool = False  # a stack that some models of the family do without
    means: tuple[MeanRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """One model family. Every linear must be named by a rule or matched by `keep`."""

    name: str
    models: str  # what people call them, for the list of families in the documentation
    classes: tuple[str, ...]  # diffusers class names (`_class_name` in config.json), the present one first
    config_signature: frozenset[str]  # config keys that give the class away where `_class_name` is missing
    component: str  # the pipeline's folder that holds the model
    blocks: tuple[BlockRule, ...]
    keep: tuple[str, ...]
    w4a16: tuple[str, ...] = ()  # modulation linears outside the stacks, by full path
    config_values: Mapping[str, object] = field(default_factory=dict[str, object])
    """Config values that tell the family from others of its class; a key that is missing counts as None."""

    def matches(self, config: Mapping[str, object]) -> bool:
        """Whether a diffusers config is of this family."""
        class_name = config.get("_class_name")
        of_class = class_name in self.classes if class_name else self.config_signature <= config.keys()
        return of_class and all(config.get(key) == value for key, value in self.config_values.items())
