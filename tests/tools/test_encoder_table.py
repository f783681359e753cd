"""What fits a card, counted from published sizes."""

from __future__ import annotations

import pytest

from svdq_cli.text import table
from tools.encoder_table import PAGE, PIPELINES, encoder_plan, line


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("T5-XXL", 4_762_310_656), ("CLIP-G", 694_659_840), ("Qwen2.5-VL-7B", 8_292_166_656)],
)
def test_encoders_have_the_parameters_that_were_published(name: str, parameters: int):
    assert encoder_plan(name).bytes_before == 2 * parameters


@pytest.mark.parametrize("pipeline", ["SDXL", "FLUX.2 klein 9B"])
def test_the_page_has_what_is_counted(pipeline: str):
    row = list(table(("",) * 8, [line(pipeline)]))[-1]
    assert row in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_every_pipeline():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for pipeline in PIPELINES:
        assert any(text.startswith(f"| {pipeline} |") for text in lines)
