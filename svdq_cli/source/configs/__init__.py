"""A model's config from its names and shapes, for single files that come without one.

What the shapes of a published architecture do not say (head counts of a UNet, rotary axes) is taken from the published
model of the same shapes; a model whose shapes fit none needs a base pipeline, which has the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from svdq_cli.source.configs.flux import CHROMA, FLUX1, FLUX2
from svdq_cli.source.configs.shapes import Facts, KnownClass, Shapes
from svdq_cli.source.configs.transformers import PIXART, QWEN_IMAGE, SANA, SD3, Z_IMAGE
from svdq_cli.source.configs.unet import UNET
from svdq_cli.source.configs.wan import WAN

__all__ = ["KNOWN_CLASSES", "KnownClass", "class_of_names", "differences", "known_class", "published_config"]

KNOWN_CLASSES: tuple[KnownClass, ...] = (
    FLUX1,
    FLUX2,
    CHROMA,
    QWEN_IMAGE,
    SD3,
    SANA,
    Z_IMAGE,
    PIXART,
    WAN,
    UNET,
)


def class_of_names(names: Mapping[str, object]) -> KnownClass | None:
    """The class whose diffusers names these are."""
    return next((known for known in KNOWN_CLASSES if known.signature <= names.keys()), None)


def known_class(model_class: str) -> KnownClass:
    return next(known for known in KNOWN_CLASSES if known.model_class == model_class)


def published_config(known: KnownClass, tensors: Shapes, original: Shapes) -> Facts | None:
    """The whole config, or None where the shapes are not those of a published model. `original`: the tensors under the
    names that their file has, with those that diffusers' class has no place for."""
    facts = known.facts(tensors)
    rest = known.rest(facts)
    if rest is None:
        return None
    return {"_class_name": known.model_class, **rest, **facts, **known.beside(original)}


@dataclass(frozen=True, slots=True)
class _Shape:
    shape: tuple[int, ...]


def differences(
    tensors: Shapes, others: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[str, object, object], ...]:
    """The config values that two models differ in, as far as names and shapes show: (name, the first's, the other's).

    Empty for a class that svdq has no table for.
    """
    known = class_of_names(others)
    if known is None:
        return ()
    first, second = (
        {**known.facts(shapes), **known.shown(shapes)}
        for shapes in (tensors, {name: _Shape(shape) for name, shape in others.items()})
    )
    return tuple((name, first[name], second[name]) for name in first if first[name] != second[name])
