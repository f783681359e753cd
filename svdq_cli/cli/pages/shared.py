"""What several pages have in common."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.reports import LayerSqnr, Summary
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
