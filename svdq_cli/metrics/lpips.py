"""LPIPS (Zhang et al. 2018): distance in a network's features; 0 for equal images, lower is better."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from svdq_cli.metrics.metric import (
    Measure,
    Measured,
    Metric,
    hub_checkpoint,
    require_package,
    require_weights,
    rgb_batch,
)

if TYPE_CHECKING:
    import torch

_INSTALL = "pip install 'svdq[metrics]'"
_BACKBONE = "alexnet-owt-7be5be79.pth"  # lpips brings its own linear weights, torchvision the AlexNet
_FETCH = "python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\""


def load_lpips(device: torch.device) -> Measure:
    """Version 0.1 on AlexNet, which the SVDQuant paper's figures use too. Raises EnvironmentLacksError."""
    import torch

    require_package("torchvision", metric="LPIPS", install=_INSTALL)
    package = require_package("lpips", metric="LPIPS", install=_INSTALL)
    require_weights(hub_checkpoint(_BACKBONE), metric="LPIPS", fetch=_FETCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips asks torchvision for weights the old way
        network = package.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def lpips(batch: Measured) -> list[float]:
        first, second = (
            rgb_batch(images).to(device).float() / 127.5 - 1 for images in (batch.reference, batch.images)
        )
        return network(first, second).flatten().tolist()

    return lambda batches: [figure for batch in batches for figure in lpips(batch)]


METRIC = Metric(
    key="lpips",
    title="LPIPS",
    kind="pair",
    better="lower",
    load=lambda device, images: load_lpips(device),
    place=2,
    digits=4,
)
