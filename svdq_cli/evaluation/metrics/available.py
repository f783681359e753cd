"""Which metrics can be measured here, and why the others can't."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.evaluation.metrics.clip import load_clip
from svdq_cli.evaluation.metrics.fid import Fid, load_fid
from svdq_cli.evaluation.metrics.image_reward import load_image_reward
from svdq_cli.evaluation.metrics.lpips import load_lpips
from svdq_cli.evaluation.metrics.metric import PairMetric, PictureMetric

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Metrics:
    """`pairs` compare with the 16-bit picture, `pictures` judge a picture by its prompt, by JSON name. `missing`: the
    others, with the reason and the cure."""

    pairs: Mapping[str, PairMetric]
    pictures: Mapping[str, PictureMetric]
    fid: Fid | None
    missing: Mapping[str, str]


def find_metrics(device: torch.device, *, pictures: int) -> Metrics:
    """Loads what is installed. `pictures`: how many there will be, which FID depends on."""
    missing: dict[str, str] = {}

    def loaded(name: str, load: Callable[[], T]) -> dict[str, T]:
        try:
            return {name: load()}
        except EnvironmentLacksError as lack:
            missing[name] = f"{lack.message}; {lack.hint}"
            return {}

    pairs = loaded("lpips", lambda: load_lpips(device))
    judged = {
        **loaded("clip", lambda: load_clip(device)),
        **loaded("image_reward", lambda: load_image_reward(device)),
    }
    fid = loaded("fid", lambda: load_fid(device, pictures=pictures)).get("fid")
    return Metrics(pairs, judged, fid, missing)
