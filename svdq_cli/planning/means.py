"""Which inputs of a model can do without their mean: where it goes, and who takes it back.

A layer's input often has a constant part that 4-bit rounding has to carry. It moves into biases without changing what
the model computes: the tensors that give it (`producers`) give x - mean, and every layer that reads it adds W·mean to
its bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from svdq_cli.families import Family
from svdq_cli.families.family import BlockRule, MeanRule, Producer
from svdq_cli.planning.plan import Inventory, block_prefixes
from svdq_cli.records import ModelPlan


@dataclass(frozen=True, slots=True)
class MeanPlace:
    """Inputs that move by one vector of `width` numbers, added to the first of their channels.

    `readers`: all layers that read them. `producers`: the tensors that give it away, and from which of each one's
    numbers on. `measured`: the inputs among them that a plan's statistics know, by their names there.
    """

    readers: tuple[str, ...]
    producers: tuple[tuple[str, int], ...]
    width: int
    measured: tuple[str, ...] = ()


def mean_places(family: Family | None, inventory: Inventory, plan: ModelPlan) -> tuple[MeanPlace, ...]:
    """Where the means of a plan's inputs can go, in the order in which layers run; none for what has no family.

    An input is left out where a reader has no bias, where a producer is not there, and where no W4A4 layer reads it.
    """
    if family is None or len(plan.components) > 1:
        return ()
    names = [linear.name for linear in inventory.linears]
    inputs = {name: shared.name for shared in plan.inputs for name in shared.layers}
    quantized = {layer.name for layer in plan.w4a4}
    found: list[MeanPlace] = []
    for block in family.blocks:
        for prefix in block_prefixes(names, block.stack):
            for place in _of_block(block, prefix, inventory.state):
                read = [inputs[name] for name in place.readers if name in quantized]
                if read:
                    measured = tuple(dict.fromkeys(read))
                    found.append(MeanPlace(place.readers, place.producers, place.width, measured))
    return tuple(found)


def _of_block(block: BlockRule, prefix: str, state: Mapping[str, tuple[int, ...]]) -> Iterator[MeanPlace]:
    for rule in block.means:
        readers = tuple(
            f"{prefix}.{name}"
            for reading in rule.inputs
            if all(f"{prefix}.{name}.weight" in state for name in reading)
            for name in reading
        )
        if not readers or any(f"{name}.bias" not in state for name in readers):
            continue
        columns = min(state[f"{name}.weight"][1] for name in readers)
        produced = [_piece(rule, producer, prefix, columns, state) for producer in rule.producers]
        if all(produced):
            found = [piece for piece in produced if piece is not None]
            yield MeanPlace(readers, tuple((name, start) for name, start, _ in found), found[0][2])


def _piece(
    rule: MeanRule, producer: Producer, prefix: str, columns: int, state: Mapping[str, tuple[int, ...]]
) -> tuple[str, int, int] | None:
    """(a producer's tensor, the first of its numbers that shift the input, how many these are); None where the model
    has none that fits."""
    name = f"{prefix}.{producer.tensor}"
    if name not in state:
        return None
    size = 1
    for length in state[name]:
        size *= length
    width = size if rule.first else columns
    if size % width or width > columns or size // width not in producer.pieces:
        return None
    return name, producer.pieces[size // width] * width, width
