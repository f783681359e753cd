"""Teach the text encoders to read before anything is drawn: which object is where, and what it looks like.

Large models get their text encoders trained already. Trained from nothing with the transformer, these learned the
words within minutes but not which of two objects is the left one (first or second, times "left of" or "right of" is
an exclusive or); read apart from pictures it takes a minute.
"""

from __future__ import annotations

import copy
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdq_cli.demo.denoiser import Captions, Denoiser
from svdq_cli.demo.schedule import learning_rate
from svdq_cli.demo.text import WIDTH
from svdq_cli.demo.world import BACKGROUNDS, OBJECT_COLORS, PLACES, SHAPES, SIZES, Scene, caption_of

SPOTS = (*PLACES, "left", "right", "top", "bottom")
SPOTS_OF_RELATION = {  # of the first and the second thing
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
TOKEN_CLASSES = (len(SPOTS) + 1, len(OBJECT_COLORS) + 1, len(SHAPES) + 1, len(SIZES) + 1, len(BACKGROUNDS))
SPOT_CLASSES = (len(OBJECT_COLORS) + 1, len(SHAPES) + 1, len(SIZES) + 1)
KEEP = 0.3  # weight of staying near the states that an already trained transformer knows
BATCH = 256


def spots_of(scene: Scene) -> tuple[str, ...]:
    """Where each thing of a scene is in the picture."""
    return (scene.layout,) if len(scene.things) == 1 else SPOTS_OF_RELATION[scene.layout]


def token_targets(scene: Scene, *, long: bool, length: int) -> list[list[int]]:
    """(length, 5): the spot, color, shape and size (0: none) a T5 token's phrase is about, and the background."""
    background = BACKGROUNDS.index(scene.background)
    targets = [[0, 0, 0, 0, background] for _ in range(length)]
    words = caption_of(scene, long=long).split()
    starts = [index - 1 for index, word in enumerate(words) if word in SIZES]  # of "a small red circle"
    for start, thing, spot in zip(starts, scene.things, spots_of(scene), strict=True):
        entry = [SPOTS.index(spot) + 1, *_looks(thing.color, thing.shape, thing.size), background]
        targets[start : start + 4] = [entry] * 4
    return targets


def spot_targets(scene: Scene) -> list[list[int]]:
    """(len(SPOTS), 3): the color, shape and size of the thing at each spot, 0 for none."""
    targets = [[0, 0, 0] for _ in SPOTS]
    for thing, spot in zip(scene.things, spots_of(scene), strict=True):
        targets[SPOTS.index(spot)] = _looks(thing.color, thing.shape, thing.size)
    return targets


def _looks(color: str, shape: str, size: str) -> list[int]:
    return [OBJECT_COLORS.index(color) + 1, SHAPES.index(shape) + 1, SIZES.index(size) + 1]


def teach_reading(
    model: Denoiser,
    captions: Captions,
    scenes: tuple[Scene, ...],
    *,
    steps: int,
    keep: bool,
    peak: float = 2e-3,
) -> None:
    """Train both text encoders of `model` in place for `steps` steps, with linear readers that are thrown away.

    `keep` holds the states near what they were, for a transformer that was trained on them.
    """
    longest = captions.t5.shape[1]
    wordings = [(scene, long) for scene in scenes for long in (False, True)]
    tokens = torch.tensor([token_targets(scene, long=long, length=longest) for scene, long in wordings])
    spots = torch.tensor([spot_targets(scene) for scene, _ in wordings])
    token_reader = nn.Linear(WIDTH, sum(TOKEN_CLASSES))
    spot_reader = nn.Linear(WIDTH, len(SPOTS) * sum(SPOT_CLASSES))
    old_t5, old_clip = copy.deepcopy(model.text_encoder_2), copy.deepcopy(model.text_encoder)
    encoders = (model.text_encoder_2, model.text_encoder)
    parameters = [*token_reader.parameters(), *spot_reader.parameters()]
    parameters += [value for encoder in encoders for value in encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps, step, peak=peak, warmup=30)
        rows = torch.randint(len(wordings), (BATCH,))
        clip_ids, t5_ids = captions.batch(rows, length=(18, 20, 24, 32)[step % 4])
        states = model.text_encoder_2(t5_ids)[0]
        pooled = model.text_encoder(clip_ids).pooler_output
        read = token_reader(states[:, :longest]).split(TOKEN_CLASSES, dim=-1)
        loss = _loss(read, tokens[rows])
        seen = spot_reader(pooled).unflatten(-1, (len(SPOTS), -1)).split(SPOT_CLASSES, dim=-1)
        sight = 3.0 * _loss(seen, spots[rows])
        total = loss + sight
        if keep:
            with torch.no_grad():
                old_states, old_pooled = old_t5(t5_ids)[0], old_clip(clip_ids).pooler_output
            drift = F.mse_loss(states, old_states) + F.mse_loss(pooled, old_pooled)
            total = total + KEEP * drift
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 25 == 0:
            told = f" drift {drift.item():.3f}" if keep else ""
            print(
                f"reading step {step + 1} {time.monotonic() - started:.0f} s tokens {loss.item():.4f} "
                f"spots {sight.item():.4f}{told}",
                flush=True,
            )


def _loss(read: tuple[Tensor, ...], targets: Tensor) -> Tensor:
    """Sum over the questions of the mean cross-entropy; `targets` (..., questions)."""
    losses = [F.cross_entropy(part.flatten(0, -2), targets[..., i].flatten()) for i, part in enumerate(read)]
    return torch.stack(losses).sum()
