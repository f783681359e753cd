"""`--plan --gpu NAME`: whether converting and generating fit a card that this machine need not have, and how long.

Nothing here was measured on a GPU. Memory is counted as `conversion.predict` counts it; times are the conversion's
counts of operations at what NVIDIA publishes of the card, of which a range of shares is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from svdq_cli.conversion.machine_speed import RANK, SIDE, Speed
from svdq_cli.conversion.predict import Forecast, lack_of_ram, stage_seconds, vram_bytes
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.prepare.facts import other_weights
from svdq_cli.prepare.prepare import counts_of
from svdq_cli.reports import GpuConversion, GpuFacts, GpuGeneration
from svdq_cli.solve.costs import Rates
from svdq_cli.solve.low_rank import OVERSAMPLE
from svdq_cli.source import Source
from svdq_cli.storage.json_files import read_json
from svdq_cli.system.graphics_cards import Card, Published

CONTEXT = 700 * 2**20  # bytes that CUDA's context, its libraries and a desktop take
# Of published rates, and seconds of one small operation: the better end of the range, then the worse
BEST, WORST = (0.6, 5e-6), (0.2, 20e-6)
# Feature maps of an autoencoder's decoder that are alive at once at full size, with its next-to-widest channels
_DECODER_MAPS = 4
# Bytes that pass the card's memory for every number that is rounded or compared, in some ten float32 operations
_ROUNDING_TRAFFIC = 80
BASIS = (
    "predicted from the GPU's published rates, assuming that 20 to 60 % of them is reached; "
    "svdq has not been measured on a GPU"
)


def on_card(
    job: Forecast, card: Card, settings: SamplingSettings, local: Speed, *, preparing: float
) -> GpuFacts:
    """Predictions for one conversion on `card`.

    `settings`: how images are generated; `local`: this machine's speed, whose disk and processor are taken to be the
    card's machine's; `preparing`: seconds that making the plan took.
    """
    whole = max(0, card.memory_bytes - CONTEXT)
    limit = job.options.max_vram
    usable = whole if limit is None else min(whole, limit)
    options = replace(job.options, max_vram=usable)
    there = replace(job, device=torch.device("cuda"), options=options)
    least = _least_to_calibrate(there, settings) if there.images else 0
    lack = lack_of_ram(there)
    fits = least <= usable and lack is None
    seconds = None
    if card.published is not None and fits:
        low, high = (
            stage_seconds(
                there, card_speed(card.published, local, share=share, call_seconds=call), preparing
            ).total
            for share, call in (BEST, WORST)
        )
        seconds = (low, high)
    peak = min(usable, max(least, vram_bytes(there) or 0)) if least <= usable else least
    return GpuFacts(
        name=card.name,
        memory_bytes=card.memory_bytes,
        convert=GpuConversion(fits, seconds, peak, lack),
        generate=_generation(there, settings, whole),
        basis=BASIS if card.published is not None else "times are predicted if the GPU is given by name",
    )


def card_speed(published: Published, local: Speed, *, share: float, call_seconds: float) -> Speed:
    """Rates of the operations that conversions consist of, at a `share` of what is published of a card and
    `call_seconds` for one small operation."""
    bandwidth = share * published.bandwidth
    calls = 1 / call_seconds
    return Speed(
        solve=Rates(
            matmul=share * published.float32,
            # Two products with few columns read the weight, 4 bytes a number, once each.
            sketch=(RANK + OVERSAMPLE) / 2 * bandwidth,
            # A QR of few columns is a chain of small steps.
            bases=share * published.float32 / 100,
            quantized=bandwidth / _ROUNDING_TRAFFIC,
            compared=bandwidth / _ROUNDING_TRAFFIC,
            # One column of at least SIDE rows takes some 15 small operations, one step of smoothing some 60.
            gptq=4 * SIDE * calls / 15,
            factored=share * published.float32 / 64,  # float64 runs at a 64th on GeForce cards
            learned=SIDE * calls / 60,
            calls=calls,
        ),
        forward=share * published.matrix,
        read=local.read,
        write=local.write,
        hashed=local.hashed,
    )


# ------------------------------------------------------------------------------------------------- memory


def _least_to_calibrate(job: Forecast, settings: SamplingSettings) -> int:
    """Bytes without which the 16-bit model can't run on the card: activations, and one block's weights at a time."""
    tokens = counts_of(job.prepared, settings)
    block = max(
        2 * sum(linear.in_features * linear.out_features for linear in linears)
        for linears in tokens.blocks.values()
    )
    return block + tokens.forward_bytes(batch=settings.batch_size, itemsize=2)


def _generation(job: Forecast, settings: SamplingSettings, usable: int) -> GpuGeneration:
    """One image with the converted model: everything on the card, or one component at a time as diffusers'
    `enable_model_cpu_offload` has it."""
    prepared = job.prepared
    packed = prepared.targets[0].bytes(prepared.inventory.state)
    sampling = counts_of(prepared, settings).forward_bytes(batch=1, itemsize=2)
    pipeline = prepared.source.pipeline
    others = _component_bytes(prepared.source)
    others |= {plan.component: plan.bytes_after for plan in prepared.encoders}
    decoding = _decoding_bytes(pipeline, settings) if pipeline else 0
    together = packed + sum(others.values()) + max(sampling, decoding)
    alone = [packed + sampling, others.pop("vae", 0) + decoding, *others.values()]
    return GpuGeneration(together <= usable, max(alone) <= usable, together, max(alone))


def _component_bytes(source: Source) -> dict[str, int]:
    """Weights of the pipeline's other components, by component."""
    found: dict[str, int] = {}
    for file, size in other_weights(source).items():
        component = file.partition("/")[0]
        found[component] = found.get(component, 0) + size
    return found


def _decoding_bytes(pipeline: Path, settings: SamplingSettings) -> int:
    """Feature maps of the autoencoder's decoder, in 16 bits, for one image at full size."""
    file = pipeline / "vae" / "config.json"
    channels = read_json(file).get("block_out_channels") if file.is_file() else None
    if not isinstance(channels, (list, tuple)) or not channels:
        return 0
    widths = cast("Sequence[int]", channels)
    return _DECODER_MAPS * 2 * widths[min(1, len(widths) - 1)] * settings.height * settings.width
