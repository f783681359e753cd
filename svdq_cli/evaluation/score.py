"""Scores of pictures on disk, a few in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from PIL.Image import Image

from svdq_cli.evaluation.gallery import Gallery, read_picture
from svdq_cli.evaluation.images import psnr_db, ssim, summarize
from svdq_cli.evaluation.metrics import Metrics
from svdq_cli.records import Event, Observer
from svdq_cli.reports import Summary

BATCH = 8  # pictures that a network judges at once


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of one way of drawing, picture by picture, by metric; FID is one figure for all. `noise`: by metric, how
    a figure differs between two runs that nobody can tell apart."""

    per_picture: Mapping[str, Sequence[float]]
    fid: float | None
    noise: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])

    def summary(self, metric: str) -> Summary | None:
        figures = self.per_picture.get(metric)
        return summarize(figures, self.noise.get(metric, ())) if figures else None


def score_pairs(
    gallery: Gallery, reference: str, way: str, prompts: Sequence[str], metrics: Metrics, observe: Observer
) -> Scores:
    """`way` against `reference`: PSNR, SSIM and what `metrics` has."""
    found: dict[str, list[float]] = {
        name: [] for name in ("psnr_db", "ssim", *metrics.pairs, *metrics.pictures)
    }
    stage = f"score {way}"
    observe(Event("start", stage, 0, len(prompts)))
    for first, said in _batches(prompts):
        exact, drawn = _read(gallery, reference, first, said), _read(gallery, way, first, said)
        found["psnr_db"] += map(psnr_db, exact, drawn)
        found["ssim"] += map(ssim, exact, drawn)
        for name, pair_metric in metrics.pairs.items():
            found[name] += pair_metric(exact, drawn)
        for name, metric in metrics.pictures.items():
            found[name] += metric(drawn, said)
        observe(Event("advance", stage, first + len(said), len(prompts)))
    fid = None
    if metrics.fid is not None:
        fid = metrics.fid(
            (_read(gallery, reference, i, said), _read(gallery, way, i, said))
            for i, said in _batches(prompts)
        )
    observe(Event("end", stage, len(prompts), len(prompts)))
    return Scores(found, fid)


def score_pictures(gallery: Gallery, way: str, prompts: Sequence[str], metrics: Metrics) -> Scores:
    """What can be said of pictures without others to compare them with."""
    found: dict[str, list[float]] = {name: [] for name in metrics.pictures}
    for name, metric in metrics.pictures.items():
        for first, said in _batches(prompts):
            found[name] += metric(_read(gallery, way, first, said), said)
    return Scores(found, None)


def _batches(prompts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    return ((first, prompts[first : first + BATCH]) for first in range(0, len(prompts), BATCH))


def _read(gallery: Gallery, way: str, first: int, prompts: Sequence[str]) -> list[Image]:
    return [read_picture(gallery, way, index) for index in range(first, first + len(prompts))]
