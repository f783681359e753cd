"""Ten classes without a family file, each on a tiny pipeline: calibrated, converted, checked, and it draws.

`make pipelines` does the same with every tiny pipeline.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from svdq_cli.planning.structure import STRUCTURAL
from tests.tiny_pipelines import FAST, round_trip


@pytest.mark.parametrize("name", FAST)
def test_a_calibrated_conversion_is_sound_and_draws(name: str, tmp_path: Path):
    report = round_trip(name, tmp_path)
    assert report.status == "ok"
    assert report.model.family == STRUCTURAL
    assert not any("without a forward pass" in text for text in report.warnings)
    # a layer whose layout or smoothing is wrong is below 3 dB
    assert report.layer_sqnr_db.min > 10
