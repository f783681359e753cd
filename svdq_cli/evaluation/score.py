"""Scores of images on disk, a few in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL.Image import Image

from svdq_cli.errors import EnvironmentLacksError
from svdq_cli.evaluation.image_store import ImageStore, read_image
from svdq_cli.evaluation.images import summarize
from svdq_cli.metrics import METRICS, Measure, Measured, MetricKind
from svdq_cli.records import Event, Observer
from svdq_cli.reports import Summary

BATCH = 8  # images that a network judges at once


@dataclass(frozen=True, slots=True)
class Loaded:
    """What can be measured here. `missing`: the other metrics by key, with the reason and the cure."""

    measures: Mapping[str, Measure]
    missing: Mapping[str, str]

    def of_kind(self, *kinds: MetricKind) -> dict[str, Measure]:
        return {key: measure for key, measure in self.measures.items() if METRICS[key].kind in kinds}

    def without_networks(self) -> Loaded:
        """Those that are always there."""
        return Loaded({key: found for key, found in self.measures.items() if METRICS[key].always}, {})


def load_metrics(device: torch.device, *, images: int) -> Loaded:
    """Loads what is installed. `images`: how many there will be, which FID depends on."""
    measures: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    for key, metric in METRICS.items():
        try:
            measures[key] = metric.load(device, images)
        except EnvironmentLacksError as lack:
            missing[key] = f"{lack.message}; {lack.hint}"
    return Loaded(measures, missing)


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of one way of sampling, image by image, by metric, and those that all images have in one. `noise`: by
    metric, how a metric differs between two runs that can't be told apart."""

    per_image: Mapping[str, Sequence[float]]
    whole: Mapping[str, float] = field(default_factory=dict[str, float])
    noise: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])

    def summary(self, metric: str) -> Summary | None:
        figures = self.per_image.get(metric)
        return summarize(figures, self.noise.get(metric, ())) if figures else None

    def figures(self, *kinds: MetricKind) -> dict[str, Summary | float | None]:
        """Every metric of these kinds as reports have it; None where it was not measured."""
        return {
            key: self.whole.get(key) if metric.kind == "all images" else self.summary(key)
            for key, metric in METRICS.items()
            if metric.kind in kinds
        }


def score_pairs(
    image_store: ImageStore,
    reference: str,
    way: str,
    prompts: Sequence[str],
    metrics: Loaded,
    observe: Observer,
    *,
    stage: str,
) -> Scores:
    """Scores of the images of `way` against those of `reference`, by all `metrics`. `stage` names the progress."""
    each = metrics.of_kind("pair", "image")
    found: dict[str, list[float]] = {key: [] for key in each}
    observe(Event("start", stage, 0, len(prompts)))
    for first, said in _batches(prompts):
        batch = _read_pairs(image_store, reference, way, first, said)
        for key, measure in each.items():
            found[key] += measure([batch])
        observe(Event("advance", stage, first + len(said), len(prompts)))
    whole = {
        key: measure(_read_pairs(image_store, reference, way, i, said) for i, said in _batches(prompts))[0]
        for key, measure in metrics.of_kind("all images").items()
    }
    observe(Event("end", stage, len(prompts), len(prompts)))
    return Scores(found, whole)


def score_images(image_store: ImageStore, way: str, prompts: Sequence[str], metrics: Loaded) -> Scores:
    """Scores of images that need no other images to compare with."""
    return Scores(
        {
            key: measure(_read_pairs(image_store, way, way, first, said) for first, said in _batches(prompts))
            for key, measure in metrics.of_kind("image").items()
        }
    )


def _batches(prompts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    return ((first, prompts[first : first + BATCH]) for first in range(0, len(prompts), BATCH))


def _read(image_store: ImageStore, way: str, first: int, prompts: Sequence[str]) -> list[Image]:
    return [read_image(image_store, way, index) for index in range(first, first + len(prompts))]


def _read_pairs(
    image_store: ImageStore, reference: str, way: str, first: int, prompts: Sequence[str]
) -> Measured:
    images = _read(image_store, way, first, prompts)
    exact = images if reference == way else _read(image_store, reference, first, prompts)
    return Measured(exact, images, prompts)
