"""Teach the text encoders to read before anything is drawn: which object is where, and what it looks like.

Large models get their text encoders trained already. Trained from nothing with the transformer, these learned the
words in 300 steps, but in 1500 not which of two objects is the left one: first or second, times "left of" or "right
of", is an exclusive or. Read apart from pictures it takes 400 cheap steps.
"""

# diffusers' and torch's modules are untyped where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from svdq_cli.demo.world import BACKGROUNDS, OBJECT_COLORS, PLACES, SHAPES, SIZES, Scene, Thing, caption_of
from tools.train_demo.text import WIDTH, Captions

SPOTS = (*PLACES, "left", "right", "top", "bottom")
SPOTS_OF_RELATION = {  # of the first and the second thing
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
LOOKS = (len(OBJECT_COLORS), len(SHAPES), len(SIZES))  # classes of the questions about a thing
TOKEN_QUESTIONS = (len(SPOTS), *LOOKS, len(BACKGROUNDS))
UNASKED = -100  # the index that cross_entropy leaves out
BATCH = 256


def spots_of(scene: Scene) -> tuple[str, ...]:
    """Where each thing of a scene is in the picture."""
    return (scene.layout,) if len(scene.things) == 1 else SPOTS_OF_RELATION[scene.layout]


def token_answers(scene: Scene, *, long: bool, length: int) -> list[list[int]]:
    """(length, 5): for each T5 token of a phrase like "a small red circle", where its thing is, what it looks like,
    and the background; UNASKED for other tokens. Every word is one token."""
    answers = [[UNASKED] * len(TOKEN_QUESTIONS) for _ in range(length)]
    words = caption_of(scene, long=long).split()
    starts = [index - 1 for index, word in enumerate(words) if word in SIZES]
    for start, thing, spot in zip(starts, scene.things, spots_of(scene), strict=True):
        answer = [SPOTS.index(spot), *_looks(thing), BACKGROUNDS.index(scene.background)]
        answers[start : start + 4] = [answer] * 4
    return answers


def spot_answers(scene: Scene) -> list[list[int]]:
    """(len(SPOTS), 3): what the thing at each spot looks like, UNASKED where there is none."""
    answers = [[UNASKED] * len(LOOKS) for _ in SPOTS]
    for thing, spot in zip(scene.things, spots_of(scene), strict=True):
        answers[SPOTS.index(spot)] = _looks(thing)
    return answers


def _looks(thing: Thing) -> list[int]:
    return [OBJECT_COLORS.index(thing.color), SHAPES.index(thing.shape), SIZES.index(thing.size)]


class Readers(nn.Module):
    """Linear readers of the encoders' outputs, thrown away after the lesson."""

    def __init__(self) -> None:
        super().__init__()
        self.of_tokens = nn.Linear(WIDTH, sum(TOKEN_QUESTIONS))
        self.of_spots = nn.Linear(WIDTH, len(SPOTS) * sum(LOOKS))

    def loss(self, states: Tensor, pooled: Tensor, tokens: Tensor, spots: Tensor) -> Tensor:
        """Sum over the questions of the mean cross-entropy.

        `states` (B, L, WIDTH) of T5 and `tokens` (B, l <= L, 5); `pooled` (B, WIDTH) of CLIP and `spots` (B, S, 3).
        """
        about_tokens = self.of_tokens(states[:, : tokens.shape[1]]).split(TOKEN_QUESTIONS, dim=-1)
        about_spots = self.of_spots(pooled).unflatten(-1, (len(SPOTS), -1)).split(LOOKS, dim=-1)
        return _answer_loss(about_tokens, tokens) + _answer_loss(about_spots, spots)


def _answer_loss(said: tuple[Tensor, ...], answers: Tensor) -> Tensor:
    losses = [F.cross_entropy(part.flatten(0, -2), answers[..., i].flatten()) for i, part in enumerate(said)]
    return torch.stack(losses).sum()


def teach_reading(
    clip: CLIPTextModel,
    t5: T5EncoderModel,
    captions: Captions,
    scenes: tuple[Scene, ...],
    *,
    steps: int,
    peak: float = 2e-3,
) -> None:
    """Train both encoders in place on the captions of `scenes`, which `captions` holds in the same order."""
    device = next(clip.parameters()).device
    wordings = [(scene, long) for scene in scenes for long in (False, True)]
    longest = captions.t5.shape[1]
    tokens = torch.tensor([token_answers(scene, long=long, length=longest) for scene, long in wordings])
    spots = torch.tensor([spot_answers(scene) for scene, _ in wordings])
    readers = Readers().to(device)
    encoders = [*clip.parameters(), *t5.parameters()]
    groups = [{"params": encoders, "lr": peak}, {"params": [*readers.parameters()], "lr": 2.5 * peak}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    # up in 20 steps, level, down to 0 over the last third: the exclusive or falls late and wants the full rate
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0, 3 * (1 - step / steps))
    )
    for step in range(steps):
        rows = torch.randint(len(wordings), (BATCH,))
        clip_ids, t5_ids = captions.batch(rows, length=(18, 20, 24, 32)[step % 4])
        pooled, states = clip(clip_ids.to(device)).pooler_output, t5(t5_ids.to(device))[0]
        loss = readers.loss(states, pooled, tokens[rows].to(device), spots[rows].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(encoders, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"reading step {step + 1} loss {loss.item():.4f}", flush=True)
