"""How often a pipeline draws what a held-out caption asks for, judged on the pixels.

python -m tools.train_demo.accuracy [--model DIR] [-n 200] [--steps 16] [--sheet sheet.png]
"""

# diffusers' and torch's modules are untyped where this file touches them
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image

from svdq_cli.demo.world import IMAGE, parse_caption, sample_captions
from svdq_cli.storage.resources import demo_model_folder
from tools.train_demo.judge import Judgement, judge

MODEL = demo_model_folder()
STEPS = 16
TEXT_LENGTH = 32  # T5 tokens; the longest caption takes 17
CAPTION_SEED = 200  # of the held-out captions


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of `images` in [0, 1]; see judge.Judgement for what each one asks."""

    images: int
    steps: int
    objects_and_colors: float
    everything: float
    count: float
    colors: float
    shapes: float
    sizes: float
    layout: float
    background: float
    seconds_per_picture: float


def generate_images(
    pipeline: FluxPipeline, captions: Sequence[str], *, steps: int = STEPS, seed: int = 0, batch: int = 20
) -> list[Image.Image]:
    """One picture a caption; picture i starts from the noise of seed + i, whatever the batch."""
    images: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        noise = [torch.Generator("cpu").manual_seed(seed + start + offset) for offset in range(len(part))]
        images += pipeline(
            part,
            height=IMAGE,
            width=IMAGE,
            num_inference_steps=steps,
            max_sequence_length=TEXT_LENGTH,
            generator=noise,
        ).images
    return images


def accuracy_of(judgements: Sequence[Judgement], *, steps: int, seconds: float) -> Accuracy:
    """Shares over `judgements`; `seconds` is the time all the pictures took."""
    names = ("objects_and_colors", "everything", "count", "colors", "shapes", "sizes", "layout", "background")
    shares = {name: sum(getattr(one, name) for one in judgements) / len(judgements) for name in names}
    return Accuracy(
        images=len(judgements),
        steps=steps,
        seconds_per_picture=round(seconds / len(judgements), 3),
        **shares,
    )


def contact_sheet(images: Sequence[Image.Image], *, columns: int = 8) -> Image.Image:
    """Pictures side by side, left to right and top to bottom."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (IMAGE + 4), rows * (IMAGE + 4)), "white")
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * (IMAGE + 4), index // columns * (IMAGE + 4)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw held-out captions and judge the pictures.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("-n", type=int, default=200, help="captions")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="write the first 32 images here, as one PNG")
    arguments = parser.parse_args()
    pipeline = FluxPipeline.from_pretrained(arguments.model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    captions = sample_captions(arguments.n, held_out=True, seed=CAPTION_SEED)
    started = time.monotonic()
    images = generate_images(pipeline, captions, steps=arguments.steps, seed=arguments.seed)
    seconds = time.monotonic() - started
    judgements = [
        judge(image, parse_caption(caption)) for image, caption in zip(images, captions, strict=True)
    ]
    if arguments.sheet:
        contact_sheet(images[:32]).save(arguments.sheet)
    print(json.dumps(asdict(accuracy_of(judgements, steps=arguments.steps, seconds=seconds)), indent=2))


if __name__ == "__main__":
    main()
