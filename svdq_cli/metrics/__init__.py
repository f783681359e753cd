"""What an image is judged by against the 16-bit model's: one file a metric, with all that anything else asks of it.

Every module here with a `METRIC` is one: it is a key of `svdq eval`'s JSON, a figure that gates may speak of, a column
of the tables on the terminal, in the Markdown summary and in the report. Packages and weights of trained networks are
used where they are installed and never fetched: a loader raises EnvironmentLacksError whose hint is the command that
fetches them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from svdq_cli.metrics.metric import Measure, Measured, Metric, MetricKind

__all__ = ["METRICS", "Measure", "Measured", "Metric", "MetricKind"]


def _metrics() -> Iterator[Metric]:
    for module in pkgutil.iter_modules(__path__):
        found = importlib.import_module(f"{__name__}.{module.name}")
        if isinstance(metric := getattr(found, "METRIC", None), Metric):
            yield metric


METRICS: Mapping[str, Metric] = {
    metric.key: metric for metric in sorted(_metrics(), key=lambda metric: metric.place)
}
