"""From the names of original checkpoints to diffusers' names, as a table of rules.

Original checkpoints (BFL, Stability, Tencent, ...) differ from diffusers in three ways only: layers are called
otherwise, matrices that read the same input are fused along their rows, and the two halves of the last modulation
(shift, scale) are swapped. So every rule says: these rows of that layer are this layer. Read forwards a rule converts a
checkpoint without touching its weights; read backwards it tells where an adapter for an original layer belongs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from svdq_cli.errors import InputError
from svdq_cli.source.tensors import Rows, RowsTensor, TensorEntry

Entry = TypeVar("Entry", bound=TensorEntry)


def claim(taken: dict[str, Entry], name: str, entry: Entry) -> None:
    """Puts a stored tensor under the name that it has in the model. Raises InputError (kind `claimed-twice`) where
    another stored key maps to the same tensor: it is impossible to tell which of the two is meant."""
    other = taken.setdefault(name, entry)
    if other is not entry:
        raise InputError(
            f"{entry.file}: {other.origin} and {entry.origin} both map to {name} of the model",
            hint="remove the wrong one, or save the model again with the tool that made it",
            where=entry.origin,
            kind="claimed-twice",
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """One layer of an original checkpoint. `{}` in names represents a block's number; a name that ends in `.*` speaks
    of all layers below it, whose rest of the name stays.

    `targets` are the diffusers layers that its rows are split into, in proportion to `split`; `swapped` says that the
    two halves of the rows change places.
    """

    original: str
    targets: tuple[str, ...]
    split: tuple[int, ...] = (1,)
    swapped: bool = False


def renamed(original: str, target: str) -> Rule:
    return Rule(original, (target,))


def fused(original: str, *targets: str, split: tuple[int, ...] = ()) -> Rule:
    return Rule(original, targets, split or (1,) * len(targets))


def swapped(original: str, target: str) -> Rule:
    return Rule(original, (target,), swapped=True)


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows of an original layer, as fractions of all its rows: `start / of` to `stop / of`."""

    start: int
    stop: int
    of: int

    def among(self, rows: int) -> tuple[int, int]:
        """Raises ValueError where `rows` can't be divided so."""
        if rows % self.of:
            raise ValueError(f"{rows} rows do not divide into {self.of} parts")
        return self.start * rows // self.of, self.stop * rows // self.of


@dataclass(frozen=True, slots=True)
class Part:
    """A diffusers layer and the rows of the original layer that it consists of, in this order."""

    target: str
    rows: tuple[RowRange, ...]

    @property
    def is_whole(self) -> bool:
        return len(self.rows) == 1 and (self.rows[0].start, self.rows[0].stop) == (0, self.rows[0].of)


def parts_of(rule: Rule) -> tuple[Part, ...]:
    """What a rule makes of an original layer."""
    if rule.swapped:
        return (Part(rule.targets[0], (RowRange(1, 2, 2), RowRange(0, 1, 2))),)
    of = sum(rule.split)
    ends = [sum(rule.split[: index + 1]) for index in range(len(rule.split))]
    ranges = [RowRange(end - size, end, of) for end, size in zip(ends, rule.split, strict=True)]
    return tuple(Part(name, (rows,)) for name, rows in zip(rule.targets, ranges, strict=True))


@dataclass(frozen=True, slots=True)
class Naming:
    """How the layers of one model class, and of `relatives` of the same names, are called in original checkpoints.

    `rules` gives the layers' rules for a model from its keys, original or diffusers' own: they tell how many blocks
    there are. `suffixes` are parameter names that differ (`scale` of an original norm is diffusers' `weight`); `unused`
    are tensors that the diffusers class computes itself.
    """

    name: str
    model_class: str
    signature: frozenset[str]  # keys that only this kind of checkpoint has
    rules: Callable[[Sequence[str]], tuple[Rule, ...]]
    suffixes: Mapping[str, str]
    unused: frozenset[str] = frozenset()
    relatives: frozenset[str] = frozenset()
    # the pipeline on the Hub that such checkpoints belong to, where diffusers itself can't tell
    published: str | None = None
    # the fused layer whose rows are head by head in LoRAs of DiffSynth-Studio, which trains weights as they are stored
    by_heads: str | None = None
    # whether LoRAs without an alpha for each layer may have one for all of them in the header
    alpha_in_header: bool = False

    @property
    def classes(self) -> frozenset[str]:
        return self.relatives | {self.model_class}


def convert_names(
    naming: Naming, stored: Mapping[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """The checkpoint under diffusers' names, and the keys that no rule speaks of.

    Raises ValueError naming the key whose rows can't be split as its rule says, InputError for two keys that represent
    one tensor.
    """
    rules = {rule.original: rule for rule in naming.rules(tuple(stored))}
    converted: dict[str, TensorEntry] = {}
    unknown: list[str] = []
    for key, entry in stored.items():
        if key in naming.unused:
            continue
        layer, suffix = split_key(key)
        parts = _parts_in(rules, layer)
        if not parts:
            unknown.append(key)
        for part in parts:
            target = ".".join(filter(None, (part.target, naming.suffixes.get(suffix, suffix))))
            claim(converted, target, _rows_of(entry, part, key))
    return converted, tuple(unknown)


def original_layers(naming: Naming, layers: Sequence[str]) -> dict[str, tuple[Part, ...]]:
    """What each original layer is in a model with these diffusers layers: the same rules, for adapters."""
    found: dict[str, tuple[Part, ...]] = {}
    for rule in naming.rules([f"{layer}.weight" for layer in layers]):
        if not rule.original.endswith(".*"):
            found[rule.original] = parts_of(rule)
            continue
        below = rule.targets[0].removesuffix("*")
        for layer in layers:
            if layer.startswith(below):
                original = rule.original.removesuffix("*") + layer.removeprefix(below)
                found.setdefault(original, (Part(layer, (RowRange(0, 1, 1),)),))
    present = set(layers)
    return {name: parts for name, parts in found.items() if all(part.target in present for part in parts)}


def expanded(rules: Sequence[Rule], keys: Sequence[str]) -> tuple[Rule, ...]:
    """Rules with every `{}` replaced by the numbers of the blocks that `keys` have, in original or diffusers' names."""
    return tuple(
        numbered(rule, number)
        for rule in rules
        for number in (
            block_numbers(keys, rule.original, rule.targets[0]) if "{}" in rule.original else (None,)
        )
    )


def numbered(rule: Rule, number: int | None) -> Rule:
    """The rule of one block."""
    if number is None:
        return rule
    targets = tuple(target.replace("{}", str(number)) for target in rule.targets)
    return replace(rule, original=rule.original.replace("{}", str(number)), targets=targets)


def block_numbers(keys: Sequence[str], *patterns: str) -> tuple[int, ...]:
    """The numbers in `keys` at the place of a pattern's `{}`, in order."""
    stacks = tuple({pattern.split("{}")[0] for pattern in patterns})
    found = {key[len(stack) :].split(".")[0] for stack in stacks for key in keys if key.startswith(stack)}
    return tuple(sorted(int(number) for number in found if number.isdigit()))


def split_key(key: str) -> tuple[str, str]:
    """`layer.weight` as (`layer`, `weight`); a bare parameter of a block keeps its whole name as the layer."""
    layer, _, suffix = key.rpartition(".")
    return (layer, suffix) if suffix in ("weight", "bias", "scale") and layer else (key, "")


def _parts_in(rules: Mapping[str, Rule], layer: str) -> tuple[Part, ...]:
    """What a layer becomes: by its own rule, or by the rule of the nearest name above it."""
    if layer in rules:
        return parts_of(rules[layer])
    above = layer
    while above:
        above = above.rpartition(".")[0]
        if (rule := rules.get(f"{above}.*")) is not None:
            target = rule.targets[0].removesuffix(".*") + layer.removeprefix(above)
            return (Part(target, (RowRange(0, 1, 1),)),)
    return ()


def _rows_of(entry: TensorEntry, part: Part, key: str) -> TensorEntry:
    if part.is_whole:
        return entry
    rows = entry.shape[0] if entry.shape else 0
    try:
        ranges = [rows_range.among(rows) for rows_range in part.rows]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return RowsTensor(tuple(Rows(entry, start, stop) for start, stop in ranges))
