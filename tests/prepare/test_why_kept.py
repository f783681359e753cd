"""`svdq inspect` says of every layer that stays at 16 bits who decided that."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdq_cli.entrypoints.inspect import inspect_source
from svdq_cli.recipe import Recipe, parse_recipe

RULES = """
version: 1
model: {source: %s}
outputs: [{format: nunchaku-lite, path: out}]
layers:
  - {match: single_transformer_blocks.0.proj_out, keep: true}
  - {match: transformer_blocks.0.ff, skip: true}
"""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("single_transformer_blocks.0.proj_out", "a rule of the recipe keeps it"),
        ("transformer_blocks.0.ff.net.2", "a rule of the recipe keeps it"),
        ("proj_out", "a rule of family flux keeps it"),
        ("transformer_blocks.0.attn.to_q", None),
    ],
)
def test_inspect_says_why_a_layer_stays_at_16_bits(tiny_flux: Path, layer: str, reason: str | None):
    report = inspect_source(_recipe(tiny_flux))
    (found,) = [each for each in report.layers if each.name == layer]
    assert (found.role == "kept") is (reason is not None)
    assert found.kept_because == reason


def _recipe(source: Path) -> Recipe:
    return parse_recipe(RULES % source, "recipe")
