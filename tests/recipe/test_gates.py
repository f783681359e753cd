"""Gates: what must hold, what must not, and which figure of which report they speak of."""

from __future__ import annotations

import math

import pytest

from svdq_cli.errors import UsageError
from svdq_cli.recipe import Gate, figure_of, parse_fail_if, parse_gate


@pytest.mark.parametrize(
    ("condition", "value", "holds"),
    [
        (">= 20", 20.0, True),
        ("> 20", 20.0, False),
        ("<=20", 20.0, True),
        ("<2e1", 19.9, True),
        (" == 20.0 ", 20.0, True),
        ("!= 20", 20.0, False),
        (">= -1.5", -1.0, True),
    ],
)
def test_a_condition_means_what_it_says(condition: str, value: float, holds: bool):
    assert parse_gate("psnr_db", condition).holds(value) is holds


@pytest.mark.parametrize("operator", [">=", ">", "<=", "<", "==", "!="])
def test_a_figure_that_is_not_a_number_meets_no_gate(operator: str):
    assert not parse_gate("psnr_db", f"{operator} 20").holds(math.nan)


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("psnr_db<20", Gate("psnr_db", ">=", 20.0)),
        ("psnr_db.min <= 18.5", Gate("psnr_db.min", ">", 18.5)),
        ("ssim > 1", Gate("ssim", "<=", 1.0)),
        ("size_ratio==1", Gate("size_ratio", "!=", 1.0)),
    ],
)
def test_fail_if_is_the_opposite_of_a_gate(text: str, gate: Gate):
    assert parse_fail_if(text) == gate


@pytest.mark.parametrize(
    "text", ["", "20", "psnr_db", "psnr_db < many", "psnr_db < 1e999", "psnr_db << 3", "psnr<20"]
)
def test_a_fail_if_that_can_t_be_read_is_bad_usage(text: str):
    with pytest.raises(UsageError):
        parse_fail_if(text)


def test_a_gate_is_written_as_it_is_read():
    gate = parse_gate("psnr_db", ">=20.50")
    assert str(gate) == "psnr_db >= 20.5"
    assert parse_gate("psnr_db", gate.condition) == gate


def test_a_gate_finds_its_figure_in_the_report():
    report = {
        "psnr_db": {"mean": 21.0, "min": 17},
        "lpips": None,
        "bytes": {"ratio": 3.6},
        "noise_floor_psnr_db": 40.0,
    }
    assert figure_of(parse_gate("psnr_db", "> 0"), report) == 21.0
    assert figure_of(parse_gate("psnr_db.min", "> 0"), report) == 17.0
    assert figure_of(parse_gate("size_ratio", "> 0"), report) == 3.6
    assert figure_of(parse_gate("noise_floor_psnr_db", "> 0"), report) == 40.0


@pytest.mark.parametrize("metric", ["lpips", "ssim.min", "peak.vram_bytes"])
def test_a_figure_that_the_report_lacks_is_none(metric: str):
    assert figure_of(parse_gate(metric, "> 0"), {"lpips": None}) is None
