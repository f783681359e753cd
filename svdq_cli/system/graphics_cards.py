"""NVIDIA cards by name, with what their makers publish of them: for predictions on machines that have none.

Sources: NVIDIA's architecture white papers (Turing, GA102, Ada, RTX Blackwell, A100, H100) and data sheets. Matrix
rates are dense, with 16-bit inputs and float32 sums: twice the float32 rate of GeForce cards from Ampere on, four times
that of Turing's.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from svdq_cli.errors import UsageError
from svdq_cli.text import bytes_of_size


@dataclass(frozen=True, slots=True)
class Published:
    """What a card is said to reach."""

    matrix: float  # floating point operations a second of 16-bit matrix products
    float32: float  # the same outside the tensor cores
    bandwidth: float  # bytes a second


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card. `published` is None where only its memory was named."""

    name: str
    memory_bytes: int
    published: Published | None = None


def _card(name: str, gib: int, matrix: float, float32: float, bandwidth: int) -> Card:
    """Memory in GiB, rates in TFLOP/s, bandwidth in GB/s."""
    return Card(name, gib * 2**30, Published(matrix * 1e12, float32 * 1e12, bandwidth * 1e9))


CARDS = (
    _card("RTX 2060", 6, 25.8, 6.5, 336),
    _card("RTX 2070", 8, 29.9, 7.5, 448),
    _card("RTX 2080", 8, 40.3, 10.1, 448),
    _card("RTX 2080 Ti", 11, 53.8, 13.4, 616),
    _card("RTX 3050", 8, 18.2, 9.1, 224),
    _card("RTX 3060", 12, 25.5, 12.7, 360),
    _card("RTX 3060 Ti", 8, 32.4, 16.2, 448),
    _card("RTX 3070", 8, 40.6, 20.3, 448),
    _card("RTX 3070 Ti", 8, 43.5, 21.7, 608),
    _card("RTX 3080", 10, 59.5, 29.8, 760),
    _card("RTX 3080 Ti", 12, 68.2, 34.1, 912),
    _card("RTX 3090", 24, 71.2, 35.6, 936),
    _card("RTX 3090 Ti", 24, 80.0, 40.0, 1008),
    _card("RTX 4060", 8, 30.2, 15.1, 272),
    _card("RTX 4060 Ti", 8, 44.1, 22.1, 288),
    _card("RTX 4060 Ti 16GB", 16, 44.1, 22.1, 288),
    _card("RTX 4070", 12, 58.3, 29.1, 504),
    _card("RTX 4070 Super", 12, 71.0, 35.5, 504),
    _card("RTX 4070 Ti", 12, 80.2, 40.1, 504),
    _card("RTX 4070 Ti Super", 16, 88.2, 44.1, 672),
    _card("RTX 4080", 16, 97.5, 48.7, 717),
    _card("RTX 4080 Super", 16, 104.4, 52.2, 736),
    _card("RTX 4090", 24, 165.2, 82.6, 1008),
    _card("RTX 5060", 8, 38.4, 19.2, 448),
    _card("RTX 5060 Ti", 8, 47.4, 23.7, 448),
    _card("RTX 5060 Ti 16GB", 16, 47.4, 23.7, 448),
    _card("RTX 5070", 12, 61.7, 30.9, 672),
    _card("RTX 5070 Ti", 16, 87.9, 43.9, 896),
    _card("RTX 5080", 16, 112.6, 56.3, 960),
    _card("RTX 5090", 32, 209.5, 104.8, 1792),
    _card("T4", 16, 65.0, 8.1, 320),
    _card("L4", 24, 121.0, 30.3, 300),
    _card("L40S", 48, 362.0, 91.6, 864),
    _card("A10", 24, 125.0, 31.2, 600),
    _card("RTX A4000", 16, 76.7, 19.2, 448),
    _card("RTX A5000", 24, 111.1, 27.8, 768),
    _card("RTX A6000", 48, 154.8, 38.7, 768),
    _card("RTX 6000 Ada", 48, 364.2, 91.1, 960),
    _card("A100 40GB", 40, 312.0, 19.5, 1555),
    _card("A100 80GB", 80, 312.0, 19.5, 2039),
    _card("H100", 80, 989.0, 67.0, 3350),
    _card("H200", 141, 989.0, 67.0, 4800),
)


def card_named(text: str) -> Card:
    """The card of a name ("RTX 4070", "nvidia geforce rtx4070", "4070"), or one of that memory alone ("12GB").

    Raises UsageError, with the nearest names, for what is neither.
    """
    known = {_key(card.name): card for card in CARDS}
    if found := known.get(_key(text)):
        return found
    if text.strip()[-1:].isalpha() and (memory := bytes_of_size(text)):
        return Card(f"a GPU with {text.strip()}", memory)
    near = difflib.get_close_matches(_key(text), known, n=3, cutoff=0.4)
    names = ", ".join(known[key].name for key in near) or "RTX 4070, RTX 3090, A100 80GB"
    raise UsageError(
        f"unknown GPU {text!r}",
        hint=f"give its memory, such as 12GB, or a name such as {names}",
        where="--gpu",
    )


def _key(name: str) -> str:
    """Two spellings of one card give one key: "NVIDIA GeForce RTX 4070" is "4070"."""
    words = re.sub(r"[^a-z0-9]+", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce)?(rtx)?", "", words)
