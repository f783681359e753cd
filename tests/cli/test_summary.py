"""`--summary FILE`: Markdown that GitHub shows, appended whatever became of the command."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from svdq_cli.cli import run
from svdq_cli.cli.summary import append_summary
from svdq_cli.reports import CheckProblem, CheckReport


def tables(text: str) -> Iterable[list[list[str]]]:
    """Every Markdown table as rows of cells."""
    rows: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.replace("\\|", "").strip("|").split("|")])
        elif rows:
            yield rows
            rows = []


def test_convert_check_and_bench_append_to_one_file(tiny_flux: Path, tmp_path: Path):
    out, summary = tmp_path / "out", tmp_path / "new/summary.md"
    words = f"convert {tiny_flux} -o {out} --effort datafree --rank 16 -q --json --fail-if size_ratio<50"
    assert run([*words.split(), "--summary", str(summary)]) == 6
    assert run(f"check {out} --summary={summary}".split()) == 0
    bench = f"bench --shapes demo --precision int4 --m 16 --seconds 0.001 --summary {summary} -q"
    assert run(bench.split()) == 0
    text = summary.read_text()
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert heads == ["### svdq convert: gate-missed", "### svdq check: ok", "### svdq bench: ok"]
    assert "- size\\_ratio >= 50".replace(">", "&gt;") in text
    found = list(tables(text))
    assert ["model", "flux (FluxTransformer2DModel)"] in found[0]
    assert all(len(row) == len(table[0]) for table in found for row in table)


def test_a_refusal_is_in_the_summary_too(tmp_path: Path):
    summary = tmp_path / "summary.md"
    assert run(["convert", str(tmp_path / "nowhere/at/all"), "-o", "x", "--summary", str(summary)]) == 3
    assert summary.read_text().startswith("### svdq convert: error\n\n**not-found** (exit code 3): ")


def test_names_can_t_break_out_of_the_table(tmp_path: Path):
    summary = tmp_path / "summary.md"
    problem = CheckProblem("a|b\n## c\x1b[2J", "<img src=x> `code` [link](x)")
    append_summary(CheckReport("failed", "comfy", 1, (problem,), None), summary)
    (*_, table) = tables(summary.read_text())
    assert len(table) == 3
    assert {len(row) for row in table} == {2}
    assert "<" not in summary.read_text()
    assert "\x1b" not in summary.read_text()


def test_a_summary_that_can_t_be_written_is_bad_usage_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    words = ["check", str(tmp_path / "nothing"), "--summary", str(tmp_path / "file/summary.md")]
    assert run(words) == 2
    assert "can't write the summary there" in capsys.readouterr().err
