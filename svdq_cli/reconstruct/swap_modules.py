"""Modules put into the places of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """`modules` by their paths."""
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


@contextmanager
def put_for_now(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {path: model.get_submodule(path) for path in modules}
    put(model, modules)
    try:
        yield
    finally:
        put(model, before)
