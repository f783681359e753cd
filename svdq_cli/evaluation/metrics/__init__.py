"""Picture metrics that need a trained network: LPIPS, CLIP score, ImageReward, FID.

Their packages and weights are used where they are installed and never fetched: each loader raises EnvironmentLacksError
whose hint is the command that fetches what is missing.
"""

from svdq_cli.evaluation.metrics.available import Metrics, find_metrics
from svdq_cli.evaluation.metrics.metric import PairMetric, PictureMetric

__all__ = ["Metrics", "PairMetric", "PictureMetric", "find_metrics"]
