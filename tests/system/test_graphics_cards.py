"""Cards by name."""

from __future__ import annotations

import re

import pytest

from svdq_cli.errors import UsageError
from svdq_cli.system.graphics_cards import CARDS, Card, card_named


@pytest.mark.parametrize(
    "text", ["RTX 4070", "rtx4070", "NVIDIA GeForce RTX 4070", "4070", "GeForce RTX-4070"]
)
def test_a_card_is_known_however_its_name_is_written(text: str):
    assert card_named(text).name == "RTX 4070"
    assert card_named(text).memory_bytes == 12 * 2**30


def test_every_card_is_found_by_its_own_name_alone():
    assert [card_named(card.name) for card in CARDS] == list(CARDS)


def test_memory_alone_has_no_rates():
    card = card_named("12GB")
    assert (card.memory_bytes, card.published) == (12 * 10**9, None)
    assert card_named("8GiB").memory_bytes == 8 * 2**30


@pytest.mark.parametrize(
    ("text", "near"), [("RTX 4075", "RTX 4070"), ("potato", "12GB"), ("", "12GB"), ("0GB", "12GB")]
)
def test_what_is_neither_name_nor_size_is_an_error_that_names_near_ones(text: str, near: str):
    with pytest.raises(UsageError) as told:
        card_named(text)
    assert near in str(told.value.hint)


@pytest.mark.parametrize("card", [card for card in CARDS if re.match(r"RTX \d{4}( Ti| Super|$)", card.name)])
def test_float32_sums_run_at_twice_the_float32_rate_of_geforce_cards(card: Card):
    """Four times that of Turing's: a slip of the pen in the table is noticed here."""
    assert card.published is not None
    share = card.published.matrix / card.published.float32
    assert share == pytest.approx(4 if card.name.startswith("RTX 20") else 2, rel=0.02)
