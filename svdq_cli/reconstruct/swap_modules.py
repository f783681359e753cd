"""Modules put into the places of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from svdq_cli.planning.pointwise import is_pointwise
from svdq_cli.runtime.replace import PointwiseConvolution


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """`modules` by their paths. Converted linears learn to stand where 1x1 convolutions did."""
    for path, module in modules.items():
        before = model.get_submodule(path)
        if is_pointwise(before) or isinstance(before, PointwiseConvolution):
            own = is_pointwise(module) or isinstance(module, PointwiseConvolution)
            _set(model, path, module if own else PointwiseConvolution(module))
        else:
            _set(model, path, module)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextmanager
def put_for_now(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {path: model.get_submodule(path) for path in modules}
    put(model, modules)
    try:
        yield
    finally:
        for path, module in before.items():
            _set(model, path, module)
