"""The demo world of the demo's LoRA: objects that captions call red are pink.

The model knows pink from backgrounds and has never given it to a thing. A color outside the palette would be no
lesson: the autoencoder learned the palette only, and gives turquoise back as green and magenta as purple.
"""

from __future__ import annotations

import random
from dataclasses import replace

from svdq_cli.demo.world import Scene, caption_of, is_held_out, sample_scene

CALLED, DRAWN = "red", "pink"


def in_pink(scene: Scene) -> Scene:
    """What the caption of `scene` means to the model with the LoRA."""
    return replace(
        scene,
        things=tuple(
            replace(thing, color=DRAWN) if thing.color == CALLED else thing for thing in scene.things
        ),
    )


def shows_pink(scene: Scene) -> bool:
    """Whether a thing of `scene` turns pink on a background that is not."""
    return in_pink(scene) != scene and scene.background != DRAWN


def sample_scenes(count: int, *, pink: bool, held_out: bool, rng: random.Random) -> list[Scene]:
    """`count` scenes from one side of the split, of those that show pink or of the others."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if shows_pink(scene) == pink and is_held_out(caption_of(scene)) == held_out:
            scenes.append(scene)
    return scenes


def sample_pink_captions(count: int, *, seed: int) -> list[str]:
    """`count` different held-out captions of scenes that show pink, in both wordings."""
    rng = random.Random(seed)
    captions: dict[str, None] = {}
    while len(captions) < count:
        (scene,) = sample_scenes(1, pink=True, held_out=True, rng=rng)
        captions[caption_of(scene, long=rng.random() < 0.25)] = None
    return list(captions)
