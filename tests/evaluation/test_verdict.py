"""What a run's figures come to, in a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

from svdq_cli.evaluation.images import summarize
from svdq_cli.evaluation.plausible import ImageProblems
from svdq_cli.evaluation.verdict import Evidence, next_step, verdict_of

SOUND = ImageProblems(images=8, black=0, nearly_uniform=0, alike=False)
NAIVE = [38.0, 40.0, 37.0, 41.0, 39.0, 38.5, 39.5, 40.5]
GOOD = Evidence(
    converted=[figure + 5 for figure in NAIVE],
    naive=NAIVE,
    noise=(),
    floor_db=100.0,
    own_noise_db=55.0,
    problems=SOUND,
    converted_problems=SOUND,
    source_mismatch=None,
    data_free=False,
)


def shifted(*by: float) -> Evidence:
    """Figures that are that much above naive rounding's, in turn."""
    return replace(GOOD, converted=[figure + by[i % len(by)] for i, figure in enumerate(NAIVE)])


@pytest.mark.parametrize(
    ("evidence", "begins", "then"),
    [
        (GOOD, "Good: 5.0 dB closer to the 16-bit images than naive 4-bit rounding", "svdq push"),
        (shifted(0.4, 0.6), "Better than naive 4-bit rounding image by image (+0.5 dB", "svdq push"),
        (shifted(1, -1), "Not distinguishable from naive 4-bit rounding with 8 images", "--samples 64"),
        (shifted(-3), "Worse than naive 4-bit rounding", "convert again with prompts typical of the model"),
        (replace(shifted(-3), data_free=True), "Worse than naive", "calibrate: convert again with --prompts"),
        (replace(GOOD, naive=None), "44.2 dB [", "without --without naive"),
        (
            replace(GOOD, converted=[44.0], naive=[39.0]),
            "One image is little evidence: 5.0 dB closer",
            "--samples 64",
        ),
        (
            replace(GOOD, source_mismatch="model is another 16-bit model"),
            "No verdict: model is another",
            "--against",
        ),
        (
            replace(GOOD, problems=replace(SOUND, nearly_uniform=8)),
            "No verdict: 8 of 8 16-bit images are nearly one color, so figures",
            "--prompts FILE --steps N",
        ),
        (
            replace(GOOD, converted_problems=replace(SOUND, black=8)),
            "Broken: 8 of 8 4-bit images",
            "bfloat16",
        ),
    ],
)
def test_the_verdict_says_how_good_and_what_next(evidence: Evidence, begins: str, then: str):
    verdict = verdict_of(evidence)
    assert verdict.startswith(begins)
    assert verdict.endswith(".")
    assert then in next_step(
        evidence, checkpoint="out/my model", page="report/report.html", gate_missed=False
    )


def test_intervals_that_overlap_are_not_called_apart():
    assert "no overlap" in verdict_of(GOOD)
    assert "intervals overlap" in verdict_of(shifted(0.4, 0.6))


def test_a_figure_near_the_noise_floors_is_as_good_as_it_gets():
    near = replace(GOOD, floor_db=44.5, own_noise_db=45.0)
    assert "as close as two runs of the 16-bit model are to each other (44.5 dB)" in verdict_of(near)
    assert "chance alone moves the 4-bit images by as much (45.0 dB)" in verdict_of(near)
    assert "chance" not in verdict_of(GOOD)


def test_noise_of_its_own_widens_the_interval():
    exact, noisy = summarize(NAIVE), summarize(NAIVE, [4.0, -3.0])
    assert exact.ci95 is not None
    assert noisy.ci95 is not None
    assert noisy.ci95[0] < exact.ci95[0]
    assert noisy.ci95[1] > exact.ci95[1]
    assert noisy.mean == exact.mean
    # so that a difference of less than chance makes is not called one
    assert verdict_of(replace(shifted(0.4, 0.6), noise=[4.0, -3.0])).startswith("Not distinguishable")


def test_what_missed_a_gate_is_not_to_be_published():
    said = next_step(GOOD, checkpoint="out/model", page="report.html", gate_missed=True)
    assert "push" not in said
    assert "--rank" in said


def test_a_pasted_command_names_the_checkpoint_as_a_shell_reads_it():
    assert "svdq push 'out/my model' OWNER/NAME" in next_step(
        GOOD, checkpoint="out/my model", page=None, gate_missed=False
    )


@pytest.mark.parametrize(
    "changed",
    [
        GOOD,
        replace(GOOD, naive=None),
        replace(GOOD, converted=[44.0], naive=[39.0]),
        shifted(-3),
        replace(GOOD, floor_db=44.5, own_noise_db=45.0),
        replace(GOOD, problems=replace(SOUND, nearly_uniform=8, kind="video")),
        replace(GOOD, converted_problems=replace(SOUND, black=8, kind="video")),
    ],
)
def test_videos_are_called_videos(changed: Evidence):
    evidence = replace(changed, kind="video")
    said = verdict_of(evidence) + next_step(
        evidence, checkpoint="out/model", page="report.html", gate_missed=False
    )
    assert "image" not in said
