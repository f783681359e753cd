"""The demo model's training set: captions of the training side of the split and their pictures."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from svdq_cli.demo.world import IMAGE, Scene, caption_of, is_held_out, parse_caption, render, sample_scene

CHUNK = 500  # pictures one worker draws at a time


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Pictures (count, PICTURE, PICTURE, 3) uint8 and, for each, its scene."""

    images: np.ndarray
    scenes: tuple[Scene, ...]


def training_set(folder: Path, *, count: int, seed: int) -> TrainingSet:
    """Draw `count` training pictures into `folder`, or read them back if they are there."""
    images_file, captions_file = (
        folder / f"pictures-{count}-{seed}.npy",
        folder / f"captions-{count}-{seed}.json",
    )
    if not captions_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        seeds = [seed * 1_000_003 + start for start in range(0, count, CHUNK)]
        with ProcessPoolExecutor() as pool:
            chunks = list(pool.map(_draw_chunk, seeds))
        np.save(images_file, np.concatenate([images for images, _ in chunks])[:count])
        captions = [caption for _, chunk in chunks for caption in chunk][:count]
        captions_file.write_text(json.dumps(captions), encoding="utf-8")
    captions = json.loads(captions_file.read_text(encoding="utf-8"))
    return TrainingSet(np.load(images_file), tuple(parse_caption(caption) for caption in captions))


def _draw_chunk(seed: int) -> tuple[np.ndarray, list[str]]:
    rng = random.Random(seed)
    images = np.empty((CHUNK, IMAGE, IMAGE, 3), dtype=np.uint8)
    captions: list[str] = []
    while len(captions) < CHUNK:
        scene = sample_scene(rng)
        caption = caption_of(scene)
        if not is_held_out(caption):
            images[len(captions)] = np.asarray(render(scene, rng=rng))
            captions.append(caption)
    return images, captions
