"""ImageReward (Xu et al. 2023): a learned human preference for a picture and its prompt; higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.evaluation.metrics.metric import PictureMetric, require_package, require_weights

_INSTALL = "pip install image-reward"  # not part of svdq[metrics]: it wants old versions of other packages
_FOLDER = Path("~/.cache/ImageReward")  # where the package itself looks
_FETCH = (
    "hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir ~/.cache/ImageReward "
    "&& hf download bert-base-uncased"
)


def load_image_reward(device: torch.device) -> PictureMetric:
    """ImageReward-v1.0. Raises EnvironmentLacksError."""
    package = require_package("ImageReward", metric="ImageReward", install=_INSTALL)
    for name in ("ImageReward.pt", "med_config.json"):
        require_weights(_FOLDER.expanduser() / name, metric="ImageReward", fetch=_FETCH)
    try:
        network = package.load("ImageReward-v1.0", device=str(device))
    except Exception as error:  # its tokenizer comes from the hub; its code was written for older libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentLacksError(
            f"ImageReward can't be loaded: {reason}", hint=_FETCH, where="ImageReward"
        ) from error

    @torch.no_grad()
    def image_reward(pictures: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        return [
            float(network.score(prompt, picture)) for prompt, picture in zip(prompts, pictures, strict=True)
        ]

    return image_reward
