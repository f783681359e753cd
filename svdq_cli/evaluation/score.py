"""Scores of images and videos on disk, a few frames in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest

import torch
from PIL.Image import Image

from svdq_cli.errors import EnvironmentLacksError, InputError
from svdq_cli.evaluation.image_store import ImageStore, kept_sound, read_frames
from svdq_cli.evaluation.images import summarize
from svdq_cli.metrics import METRICS, Measure, Measured, MetricKind
from svdq_cli.metrics.sound import snr_db
from svdq_cli.metrics.temporal import temporal_psnr_db
from svdq_cli.records import Event, Observer
from svdq_cli.reports import Summary, VideoFacts

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
class VideoScores:
    """Figures that videos have and images have not. `frames`: PSNR and SSIM, by metric, video and frame.
    `temporal_psnr_db`: of the differences between frames, by video. `audio_snr_db`: of their sounds; empty where they
    have none."""

    frames: Mapping[str, Sequence[Sequence[float]]]
    temporal_psnr_db: Sequence[float]
    audio_snr_db: Sequence[float]

    def facts(self, fps: float) -> VideoFacts:
        """As reports have it. `fps`: frames a second."""
        worst = {key: summarize([min(video) for video in found]) for key, found in self.frames.items()}
        return VideoFacts(
            frames=max(map(len, self.frames["psnr_db"])),
            fps=fps,
            worst_frame_psnr_db=worst["psnr_db"],
            worst_frame_ssim=worst["ssim"],
            temporal_psnr_db=summarize(self.temporal_psnr_db),
            audio_snr_db=summarize(self.audio_snr_db) if self.audio_snr_db else None,
        )

    def plain(self, index: int) -> dict[str, object]:
        """Of one video, as plain JSON."""
        sound = {"audio_snr_db": self.audio_snr_db[index]} if self.audio_snr_db else {}
        frames = {key: list(found[index]) for key, found in self.frames.items()}
        return {"temporal_psnr_db": self.temporal_psnr_db[index], **sound, "frames": frames}


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of one way of sampling, image by image, by metric, and those that all images have in one. `noise`: by
    metric, how a metric differs between two runs that can't be told apart. `video`: None of images."""

    per_image: Mapping[str, Sequence[float]]
    whole: Mapping[str, float] = field(default_factory=dict[str, float])
    noise: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    video: VideoScores | None = None

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
    """Scores of the images of `way` against those of `reference`, by all `metrics`: of a video, the means of its
    frames'. `stage` names the progress."""
    each = metrics.of_kind("pair", "image")
    by_frame: dict[str, list[list[float]]] = {key: [[] for _ in prompts] for key in each}
    moves: list[list[float]] = [[] for _ in prompts]
    before: _Pair | None = None
    observe(Event("start", stage, 0, len(prompts)))
    for batch in _batches(image_store, reference, way, prompts):
        for key, measure in each.items():
            for pair, figure in zip(batch, measure([_measured(batch, prompts)]), strict=True):
                by_frame[key][pair.index].append(figure)
        for pair in batch:
            if before is not None and before.index == pair.index:
                moves[pair.index].append(
                    temporal_psnr_db((before.reference, pair.reference), (before.image, pair.image))
                )
            before = pair
        observe(Event("advance", stage, batch[-1].index + 1, len(prompts)))
    whole = {
        key: measure(_measured(batch, prompts) for batch in _batches(image_store, reference, way, prompts))[0]
        for key, measure in metrics.of_kind("all images").items()
    }
    observe(Event("end", stage, len(prompts), len(prompts)))
    sounds = [_sound_snr_db(image_store, reference, way, index) for index in range(len(prompts))]
    video = None
    if any(moves):
        kept = {key: figures for key, figures in by_frame.items() if METRICS[key].always}
        video = VideoScores(
            kept,
            [_mean(of_video) for of_video in moves if of_video],
            [snr for snr in sounds if snr is not None],
        )
    return Scores(
        {key: [_mean(of_image) for of_image in found] for key, found in by_frame.items()}, whole, video=video
    )


def _mean(figures: Sequence[float]) -> float:
    return sum(figures) / len(figures)


def _sound_snr_db(image_store: ImageStore, reference: str, way: str, index: int) -> float | None:
    sounds = [kept_sound(image_store, each, index) for each in (reference, way)]
    if sounds[0] is None or sounds[1] is None:
        return None
    return snr_db(sounds[0].samples, sounds[1].samples)


def score_images(image_store: ImageStore, way: str, prompts: Sequence[str], metrics: Loaded) -> Scores:
    """Scores of images that need no other images to compare with."""
    found: dict[str, list[list[float]]] = {key: [[] for _ in prompts] for key in metrics.of_kind("image")}
    if found:
        for batch in _batches(image_store, way, way, prompts):
            for key, measure in metrics.of_kind("image").items():
                for pair, figure in zip(batch, measure([_measured(batch, prompts)]), strict=True):
                    found[key][pair.index].append(figure)
    return Scores({key: [_mean(of_image) for of_image in figures] for key, figures in found.items()})


@dataclass(frozen=True, slots=True)
class _Pair:
    """A frame of an image (which has one) or a video, and the one that it is compared with. `index`: of the prompt."""

    index: int
    reference: Image
    image: Image


def _pairs(image_store: ImageStore, reference: str, way: str, prompts: Sequence[str]) -> Iterator[_Pair]:
    for index in range(len(prompts)):
        exact = read_frames(image_store, reference, index)
        if reference == way:
            yield from (_Pair(index, frame, frame) for frame in exact)
            continue
        found = read_frames(image_store, way, index)
        for one, other in zip_longest(exact, found):
            if one is None or other is None:
                raise InputError(
                    f"{image_store.path(way, index)}: not as many frames as {image_store.path(reference, index)}",
                    hint="delete both and run svdq eval again: it generates what is missing",
                    where=str(image_store.path(way, index)),
                )
            yield _Pair(index, one, other)


def _batches(
    image_store: ImageStore, reference: str, way: str, prompts: Sequence[str]
) -> Iterator[list[_Pair]]:
    """BATCH pairs at a time, so that no more of a video is in memory."""
    pairs = _pairs(image_store, reference, way, prompts)
    while batch := list(islice(pairs, BATCH)):
        yield batch


def _measured(batch: Sequence[_Pair], prompts: Sequence[str]) -> Measured:
    return Measured(
        [pair.reference for pair in batch],
        [pair.image for pair in batch],
        [prompts[pair.index] for pair in batch],
    )
