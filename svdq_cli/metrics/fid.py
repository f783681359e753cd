"""FID (Heusel et al. 2017) of converted against 16-bit images: 0 where their distributions agree, lower is better."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from svdq_cli.errors import EnvironmentLacksError
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

SAMPLES = "--samples"  # of which there are too few: no package would help
LEAST_IMAGES = 2048  # as many as Inception has features: the covariance of fewer is singular
_INSTALL = "pip install 'svdq[metrics]'"
_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_WEIGHTS}"


def load_fid(device: torch.device, *, images: int) -> Measure:
    """Features of Inception v3 as the original has them (torch-fidelity). Raises EnvironmentLacksError, also where
    there are too few images for the figure to mean something."""
    import torch

    if images < LEAST_IMAGES:
        raise EnvironmentLacksError(
            f"FID of {images} images is meaningless",
            hint=f"generate {LEAST_IMAGES} or more with --samples",
            where=SAMPLES,
        )
    require_package("torch_fidelity", metric="FID", install=_INSTALL)
    metric = require_package("torchmetrics.image.fid", metric="FID", install=_INSTALL)
    path = hub_checkpoint(_WEIGHTS)
    require_weights(path, metric="FID", fetch=f"curl -L --create-dirs -o {path} {_URL}")
    distance = metric.FrechetInceptionDistance(feature=LEAST_IMAGES).to(device)

    @torch.no_grad()
    def fid(batches: Iterable[Measured]) -> list[float]:
        distance.reset()
        for batch in batches:
            distance.update(rgb_batch(batch.reference).to(device), real=True)
            distance.update(rgb_batch(batch.images).to(device), real=False)
        return [max(0.0, float(distance.compute()))]  # rounding may leave a little less than 0

    return fid


METRIC = Metric(
    key="fid",
    title="FID",
    kind="all images",
    better="lower",
    load=lambda device, images: load_fid(device, images=images),
    place=5,
    digits=2,
)
