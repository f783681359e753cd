"""What the tables of original names are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from svdq_cli.source.names import Rule, expanded

Rules = Callable[[Sequence[str]], tuple[Rule, ...]]


def table(*rules: Rule) -> Rules:
    """The rules of a model whose blocks differ only in their number."""
    return partial(expanded, rules)


def in_stack(original: str, target: str, rules: Sequence[Rule], *, dot: str = ".") -> tuple[Rule, ...]:
    """Rules repeated in each block of a stack: `original`.0, `original`.1, ... is `target`.0, `target`.1, ... `dot`:
    what is between the original stack's name and the number."""
    return tuple(
        replace(
            rule,
            original=f"{original}{dot}{{}}.{rule.original}",
            targets=tuple(f"{target}.{{}}.{name}" for name in rule.targets),
        )
        for rule in rules
    )


def also_called(replacements: Sequence[tuple[str, str]], *rules: Rule) -> tuple[Rule, ...]:
    """The rules, and each again under the name that another program gives the same layer: every text in
    `replacements` is replaced by the one next to it."""
    found = {rule.original: rule for rule in rules}
    for rule in rules:
        name = rule.original
        for text, other in replacements:
            name = name.replace(text, other)
        found.setdefault(name, replace(rule, original=name))
    return tuple(found.values())


def in_stacks(stacks: Sequence[str], rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Rules repeated below each stack of blocks, under names that are the same in diffusers."""
    return tuple(rule for stack in stacks for rule in in_stack(stack, stack, rules))
