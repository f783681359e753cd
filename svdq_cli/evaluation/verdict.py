"""What the figures of an evaluation come to: a sentence, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from svdq_cli.evaluation.images import PSNR_CAP_DB, summarize
from svdq_cli.evaluation.plausible import ImageProblems
from svdq_cli.reports import Summary

AS_CLOSE_DB = 1.0  # a difference that can't be seen


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a verdict rests on: PSNR to the 16-bit images, image by image. None: left out.

    `source_mismatch`: why the 16-bit model is another than the checkpoint was made from.
    """

    converted: Sequence[float]
    naive: Sequence[float] | None
    noise: Sequence[float]  # see `summarize`
    floor_db: float | None  # the 16-bit model against itself
    own_noise_db: float | None  # the 4-bit model against itself
    problems: ImageProblems  # of the 16-bit images
    converted_problems: ImageProblems
    source_mismatch: str | None
    data_free: bool
    kind: str = "image"  # what was generated: image, video


def verdict_of(evidence: Evidence) -> str:
    """One sentence: converted against naive rounding and against the noise floors, and how sure that is."""
    if evidence.source_mismatch:
        return f"No verdict: {evidence.source_mismatch}."
    if evidence.problems.meaningless:
        seen = "; ".join(evidence.problems.sentences("16-bit"))
        return f"No verdict: {seen}, so figures that compare {evidence.kind}s with them are meaningless."
    if evidence.converted_problems.black and not evidence.problems.black:
        return f"Broken: {evidence.converted_problems.sentences('4-bit')[0]}."
    return f"{_against_naive(evidence)}{_against_floors(evidence)}."


def next_step(evidence: Evidence, *, checkpoint: str, page: str | None, gate_missed: bool) -> str:
    """What to do with that verdict; commands are ready to be pasted but for names in capitals."""
    if evidence.source_mismatch:
        return "give --against the model that the checkpoint was made from"
    if evidence.problems.meaningless:
        return "sample as the 16-bit model was meant to be: --prompts FILE --steps N --width W --height H"
    if evidence.converted_problems.black and not evidence.problems.black:
        return "convert with dtype: bfloat16, or keep the layers with the largest outputs at 16 bits"
    if evidence.naive is None:
        return "run the same command without --without naive"
    if (difference := _difference(evidence)).ci95 is None:
        return f"use --samples 64: one {evidence.kind} is almost no evidence"
    if difference.ci95[0] > 0 and gate_missed:
        return "a larger --rank or --effort best gives more quality; or change the gate that was missed"
    if difference.ci95[0] > 0:
        look = (
            f"look at {page}, worst {evidence.kind}s first; then "
            if page
            else f"look at the {evidence.kind}s with --report DIR; then "
        )
        return f"{look}svdq push {shlex.quote(checkpoint)} OWNER/NAME --dry-run"
    if evidence.data_free:
        return "calibrate: convert again with --prompts FILE, or from the recipe that svdq init writes"
    if difference.ci95[1] > 0:
        return "--samples 64 gives more certainty; a larger --rank or --effort best gives more quality"
    return "convert again with prompts typical of the model, a larger --rank or --effort best"


def _against_naive(evidence: Evidence) -> str:
    own = summarize(evidence.converted, evidence.noise)
    if evidence.naive is None:
        return f"{_figure(own)} to the 16-bit {evidence.kind}s; not compared with naive 4-bit rounding"
    naive, difference = summarize(evidence.naive, evidence.noise), _difference(evidence)
    figures = f"{_figure(own)} against {_figure(naive)}"
    amount = f"{abs(difference.mean):.1f} dB"
    if own.ci95 is None or naive.ci95 is None or difference.ci95 is None:
        closer = f"{'closer to' if difference.mean > 0 else 'further from'} the 16-bit {evidence.kind}"
        return (
            f"One {evidence.kind} is little evidence: {amount} {closer} than naive 4-bit rounding ({figures})"
        )
    if own.ci95[0] > naive.ci95[1]:
        return f"Good: {amount} closer to the 16-bit {evidence.kind}s than naive 4-bit rounding ({figures}, no overlap)"
    spread = (
        f"{difference.mean:+.1f} dB, 95 % interval {difference.ci95[0]:+.1f} to {difference.ci95[1]:+.1f}"
    )
    kind, count = evidence.kind, len(evidence.converted)
    if difference.ci95[0] > 0:
        apart = f"({spread}), although the intervals overlap ({figures})"
        return f"Better than naive 4-bit rounding {kind} by {kind} {apart}"
    if difference.ci95[1] < 0:
        return f"Worse than naive 4-bit rounding ({spread}; {figures})"
    return f"Not distinguishable from naive 4-bit rounding with {count} {kind}s ({spread}; {figures})"


def _against_floors(evidence: Evidence) -> str:
    """The noise floors, as clauses that continue the sentence."""
    mean = summarize(evidence.converted).mean
    said = ""
    floor, own = evidence.floor_db, evidence.own_noise_db
    if floor is not None and floor < PSNR_CAP_DB:
        if mean >= floor - AS_CLOSE_DB:
            said += f"; as close as two runs of the 16-bit model are to each other ({floor:.1f} dB)"
        else:
            said += f"; two runs of the 16-bit model are {floor:.1f} dB apart"
    if own is not None and mean >= own - 2 * AS_CLOSE_DB and own < PSNR_CAP_DB:
        said += f"; chance alone moves the 4-bit {evidence.kind}s by as much ({own:.1f} dB)"
    return said


def _difference(evidence: Evidence) -> Summary:
    """The PSNR of converted less that of naive images, pair by pair."""
    assert evidence.naive is not None
    pairs = zip(evidence.converted, evidence.naive, strict=True)
    return summarize([own - naive for own, naive in pairs], evidence.noise)


def _figure(summary: Summary) -> str:
    if summary.ci95 is None:
        return f"{summary.mean:.1f} dB"
    return f"{summary.mean:.1f} dB [{summary.ci95[0]:.1f}, {summary.ci95[1]:.1f}]"
