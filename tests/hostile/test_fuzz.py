"""A sample of what `python -m tests.hostile.fuzz` does."""

from __future__ import annotations

import pytest

from tests.hostile.fuzz import PARSERS, fuzz


@pytest.mark.parametrize("parser", PARSERS)
def test_a_parser_answers_or_refuses_by_name_whatever_it_reads(parser: str):
    fuzz(parser, 100, fresh=False)
