"""LPIPS (Zhang et al. 2018): distance in a network's features; 0 for equal pictures, lower is better."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from PIL.Image import Image

from svdq_cli.evaluation.metrics.metric import (
    PairMetric,
    hub_checkpoint,
    require_package,
    require_weights,
    rgb_batch,
)

_INSTALL = "pip install 'svdq[metrics]'"
_BACKBONE = "alexnet-owt-7be5be79.pth"  # lpips brings its own linear weights, torchvision the AlexNet
_FETCH = "python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""


def load_lpips(device: torch.device) -> PairMetric:
    """Version 0.1 on AlexNet, which the SVDQuant paper's figures use too. Raises EnvironmentLacksError."""
    require_package("torchvision", metric="LPIPS", install=_INSTALL)
    package = require_package("lpips", metric="LPIPS", install=_INSTALL)
    require_weights(hub_checkpoint(_BACKBONE), metric="LPIPS", fetch=_FETCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips asks torchvision for weights the old way
        network = package.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def lpips(reference: Sequence[Image], other: Sequence[Image]) -> list[float]:
        first, second = (
            rgb_batch(pictures).to(device).float() / 127.5 - 1 for pictures in (reference, other)
        )
        return network(first, second).flatten().tolist()

    return lpips
