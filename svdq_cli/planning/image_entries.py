"""How the tokens lie in what a layer reads: which of them are of one image."""

from __future__ import annotations

from torch import Tensor

from svdq_cli.source import is_expert


def by_entry(name: str, activation: Tensor, images: int) -> Tensor:
    """(batch entries, tokens, K) of the activation (..., K) that the layer `name` reads in one call for `images`
    images.

    A modulation layer's (batch, K) has one token an entry; an expert's (M, K) has as many tokens of each image, one
    image after the other.
    """
    width = activation.shape[-1]
    if activation.ndim == 1:
        return activation.reshape(1, 1, width)
    if activation.ndim == 2 and is_expert(name):
        return activation.reshape(images, -1, width)
    return activation.reshape(activation.shape[0], -1, width)
