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


def in_stacks(stacks: Sequence[str], rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Rules repeated below each stack of blocks, under names that are the same in diffusers."""
    return tuple(
        replace(
            rule,
            original=f"{stack}.{{}}.{rule.original}",
            targets=tuple(f"{stack}.{{}}.{name}" for name in rule.targets),
        )
        for stack in stacks
        for rule in rules
    )
