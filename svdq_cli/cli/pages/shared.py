"""What several pages have in common."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.reports import GenerateReport, LayerSqnr, LoraFacts, Summary, TextEncoderFacts
from svdq_cli.text import bytes_text

WORST_LAYERS = 5


def print_layers(console: Console, sqnr: LayerSqnr, *, everything: bool) -> None:
    ranked = sorted(sqnr.per_layer.items(), key=lambda item: item[1])
    console.print("all layers, worst first:" if everything else "worst layers:")
    for name, value in ranked if everything else ranked[:WORST_LAYERS]:
        console.print(Text(f"  {value:6.1f} dB  {name}"))


def facts_table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")  # paths and digests are of use only whole
    return table


def db_text(summary: Summary) -> str:
    return f"{summary.mean:.1f} dB"


def frames_text(frames: int) -> str:
    """The length of a video, before more facts; nothing for an image."""
    return "" if frames == 1 else f"{frames} frames, "


def generated_text(report: GenerateReport) -> str:
    """What was generated: its size, and of what moves or sounds how long it is."""
    size = f"{report.width} x {report.height}" if report.width else ""
    moves = f"{report.frames} frames, {report.fps:g} a second" if report.frames > 1 and report.fps else ""
    sounds = f"{report.audio_seconds:.1f} s of sound" if report.audio_seconds is not None else ""
    return ", ".join(part for part in (size, moves, sounds) if part)


def loras_text(loras: Sequence[LoraFacts]) -> str:
    """LoRAs by the names of their files, each with its strength and, of several denoisers, the one that it is for."""
    return ", ".join(
        f"{PurePath(lora.path).name} at {lora.weight:g}" + (f" in {lora.component}" if lora.component else "")
        for lora in loras
    )


def typed(*words: str) -> str:
    """A command to be copied."""
    return shlex.join(words)


def size_text(before: int, after: int, ratio: float) -> str:
    return f"{bytes_text(before)} -> {bytes_text(after)} ({ratio:.2f}x smaller)"


def count_text(parameters: int) -> str:
    return (
        f"{parameters / 1e9:.2f} B parameters"
        if parameters >= 1e9
        else f"{parameters / 1e6:.2f} M parameters"
    )


def vram_text(count: int | None) -> str:
    return f", {bytes_text(count)} VRAM" if count is not None else ""


def encoder_rows(encoders: Mapping[str, TextEncoderFacts]) -> Iterator[tuple[str, str]]:
    """A row for each text encoder with 4-bit weights: its size, and how near it is to its source."""
    for name, facts in encoders.items():
        said = size_text(facts.bytes.input, facts.bytes.output, facts.bytes.ratio)
        if (states := facts.hidden_sqnr_db) is not None:
            said += f"; hidden states {states.last:.1f} dB on held-out prompts"
        elif facts.layer_sqnr_db is not None:
            kind = "outputs" if facts.calibrated else "weights, not calibrated"
            said += f"; mean {facts.layer_sqnr_db.mean:.1f} dB ({kind})"
        yield name, said
