"""ImageReward (Xu et al. 2023): a learned human preference for an image and its prompt; higher is better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.metrics.metric import Measure, Metric, require_package, require_weights

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_INSTALL = "pip install image-reward"  # not part of svdq[metrics]: it wants old versions of other packages
_FOLDER = Path("~/.cache/ImageReward")  # where the package itself looks
_FETCH = (
    "hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir ~/.cache/ImageReward "
    "&& hf download bert-base-uncased"
)


def load_image_reward(device: torch.device) -> Measure:
    """ImageReward-v1.0. Raises EnvironmentLacksError."""
    import torch

    package = require_package("ImageReward", metric="ImageReward", install=_INSTALL)
    for name in ("ImageReward.pt", "med_config.json"):
        require_weights(_FOLDER.expanduser() / name, metric="ImageReward", fetch=_FETCH)
    try:
        network = package.load("ImageReward-v1.0", device=str(device))
    except Exception as error:  # its tokenizer comes from the Hub; its code was written for older libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentLacksError(
            f"ImageReward can't be loaded: {reason}", hint=_FETCH, where="ImageReward"
        ) from error

    @torch.no_grad()
    def image_reward(prompt: str, image: Image) -> float:
        return float(network.score(prompt, image))

    return lambda batches: [
        image_reward(*each) for batch in batches for each in zip(batch.prompts, batch.images, strict=True)
    ]


METRIC = Metric(
    key="image_reward",
    title="ImageReward",
    kind="image",
    better="higher",
    load=lambda device, images: load_image_reward(device),
    place=4,
    digits=3,
)
