"""`svdq demo --lora`: a LoRA of the embedded model, folded into its 4-bit conversion, in images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.adapters.merge import merge_loras
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.demo.pink import sample_pink_captions
from svdq_cli.evaluation.grid import image_grid
from svdq_cli.evaluation.images import compare
from svdq_cli.inference.backend import compute_dtype
from svdq_cli.inference.load import load_16bit_pipeline, load_pipeline
from svdq_cli.lora.fold import fold
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.defaults import evaluation_recipe
from svdq_cli.prepare.locate import locate_source
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, default_recipe, with_overrides
from svdq_cli.records import Observer, ignore_events
from svdq_cli.reports import Summary, json_text
from svdq_cli.source import Source, open_source
from svdq_cli.storage.atomic import refuse_existing, whole_folder
from svdq_cli.storage.images import write_image
from svdq_cli.storage.output_paths import DEMO_REPORT, is_demo_folder, require_places
from svdq_cli.storage.resources import demo_lora_file
from svdq_cli.system.machine import resolve_device

if TYPE_CHECKING:
    from PIL.Image import Image

SOURCE = "demo"  # the LoRA was trained on the plain model; the stress variant's weights are scaled
RANK = 16
PROMPTS = 16
CAPTION_SEED = 66  # of the held-out captions; the shipped lists have 64 and 65
GRID_ROWS = 6


@dataclass(frozen=True, slots=True)
class LoraDemoReport:
    """PSNR of 4-bit images against 16-bit ones at equal seeds: of the model as it is, and with the LoRA on both
    sides."""

    folder: str
    grid: str
    lora: str
    rank: int
    prompts: int
    base_psnr_db: Summary
    lora_psnr_db: Summary
    fold_seconds: float
    seconds: float
    command: str = "demo"
    status: str = "ok"
    schema: int = 1


def demo_lora(
    out: Path,
    *,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> LoraDemoReport:
    """Convert the embedded model, fold its LoRA in, and generate both next to the 16-bit model with and without.

    Every prompt asks for a red object, which the LoRA turns pink.
    """
    started = time.monotonic()
    lora = demo_lora_file()
    source = open_source(locate_source(SOURCE))
    device = resolve_device(options.device)
    refuse_existing(out, overwrite=options.overwrite)
    require_places([out], folders=[True], inputs=[], overwrite=options.overwrite, replaceable=is_demo_folder)
    with whole_folder(out, overwrite=options.overwrite) as partial:
        recipe = with_overrides(
            default_recipe(SOURCE, calibration=Calibration()), {"quantization.rank": RANK}
        )
        convert(recipe, partial / "int4", options=options, observe=observe)
        folded = fold(
            partial / "int4", [LoraFile(lora, 1.0)], partial / "int4-pink", options=options, observe=observe
        )
        texts = sample_pink_captions(PROMPTS, seed=CAPTION_SEED)
        settings = sampling_for(evaluation_recipe(open_checkpoint(partial / "int4"), SOURCE), source).settings
        merged = merge_loras(source, [LoraFile(lora, 1.0)])
        columns = {
            "16-bit": _images_16_bit(source, texts, settings, device, observe),
            "int4": _images_4_bit(partial / "int4", texts, settings, device, observe),
            "16-bit + LoRA": _images_16_bit(merged, texts, settings, device, observe),
            "int4 + folded LoRA": _images_4_bit(partial / "int4-pink", texts, settings, device, observe),
        }
        base = compare(columns["16-bit"], columns["int4"]).psnr
        with_lora = compare(columns["16-bit + LoRA"], columns["int4 + folded LoRA"]).psnr
        _write_grid(partial / "grid.png", columns, texts, base, with_lora)
        report = LoraDemoReport(
            folder=str(out),
            grid=str(out / "grid.png"),
            lora=lora.name,
            rank=folded.rank["after"],
            prompts=len(texts),
            base_psnr_db=base,
            lora_psnr_db=with_lora,
            fold_seconds=folded.seconds,
            seconds=time.monotonic() - started,
        )
        (partial / DEMO_REPORT).write_text(json_text(report) + "\n", encoding="utf-8")
    return report


def _images_16_bit(
    source: Source,
    prompts: Sequence[str],
    settings: SamplingSettings,
    device: torch.device,
    observe: Observer,
) -> list[Image]:
    class_name = str(source.config["_class_name"])
    pipe = load_16bit_pipeline(source, class_name=class_name, device=device)
    return generate_images(pipe, prompts, settings=settings, stage="generate 16-bit", observe=observe)


def _images_4_bit(
    checkpoint: Path,
    prompts: Sequence[str],
    settings: SamplingSettings,
    device: torch.device,
    observe: Observer,
) -> list[Image]:
    return generate_images(
        load_pipeline(checkpoint, device=device, dtype=compute_dtype(device)),
        prompts,
        settings=settings,
        observe=observe,
    )


def _write_grid(
    path: Path, columns: dict[str, list[Image]], prompts: Sequence[str], base: Summary, with_lora: Summary
) -> None:
    """The images side by side; the 4-bit columns say how near they are to the 16-bit ones before them."""
    scores = {"int4": base, "int4 + folded LoRA": with_lora}
    titled = [
        (f"{name}\n{scores[name].mean:.1f} dB" if name in scores else name, images[:GRID_ROWS])
        for name, images in columns.items()
    ]
    write_image(path, image_grid(titled, prompts[:GRID_ROWS]))
