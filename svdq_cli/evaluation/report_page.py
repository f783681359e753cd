"""An evaluation as a chapter of the HTML report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.evaluation.compare import Evaluation, facts_of
from svdq_cli.evaluation.image_store import SHOWN_FRAMES
from svdq_cli.evaluation.images import PSNR_CAP_DB
from svdq_cli.evaluation.page import Figure, LayerRow, Plot, ReportSection, Table, Variant, show_images
from svdq_cli.evaluation.pass_times import BUSY
from svdq_cli.evaluation.passes import CONVERTED, SIXTEEN_BIT, TITLES
from svdq_cli.evaluation.plot import conversion_report
from svdq_cli.evaluation.score import Scores
from svdq_cli.metrics import METRICS
from svdq_cli.prepare.facts import sizes_of
from svdq_cli.records import Int4, W4A4Plan
from svdq_cli.reports import (
    BASELINE_TITLES,
    BaselineFacts,
    ByteFacts,
    EvalReport,
    Figures,
    ReferenceFacts,
    Summary,
    video_columns,
)
from svdq_cli.text import bytes_text, seconds_text

SHOWN = 64  # images of a chapter, if the page's budget allows
_PLOTS = (
    (
        "layers",
        "SQNR by layer",
        "Each point compares one layer's output with the 16-bit layer's; below, the gain of each search step.",
    ),
    (
        "ranks",
        "Ranks",
        "Each cell is a layer: a column for each block, a row for each position in a block.",
    ),
    (
        "singular_values",
        "Singular values",
        "The worst layers and typical ones: what smoothing moves into the weight, and what the branch takes out again.",
    ),
    (
        "activations",
        "Activations",
        "The same layers: the largest magnitude of every input channel, which the 4-bit activations must cover.",
    ),
)


def section_of(
    found: Evaluation,
    *,
    plots: Path,
    title: str,
    key: str = "evaluation",
    more_ways: Sequence[Variant] = (),
    budget: int,
    page_folder: Path,
) -> ReportSection:
    """`plots`: the folder of the SVGs. `more_ways`: generated in `found.image_store` and scored besides the usual ones;
    they follow the checkpoint. `budget`: bytes that the images may take. `page_folder`: where the
    page will be."""
    ways = _ways(found, more_ways)
    shown_ways = [Variant(SIXTEEN_BIT, TITLES[SIXTEEN_BIT]), *ways]
    by_psnr = sorted(
        range(len(found.run.prompts)), key=found.scores[CONVERTED].per_image["psnr_db"].__getitem__
    )[:SHOWN]
    shown = show_images(
        found.image_store,
        shown_ways,
        [(i, found.run.prompts[i], found.run.settings.seed_of(i)) for i in by_psnr],
        [_image_figures(found, ways, i) for i in by_psnr],
        budget=budget,
        page_folder=page_folder,
    )
    facts = {way.key: facts_of(found.image_store, way.key, found.scores[way.key]) for way in ways}
    return ReportSection(
        key=key,
        title=title,
        verdict=_verdict(found),
        next=_next(found),
        warnings=found.report.warnings,
        figures=_figures(found),
        ways=shown_ways,
        scores=_scores(found, ways, facts),
        missing={_MISSING.get(name, name): why for name, why in found.report.missing.items()},
        shown=shown,
        shown_note=_shown_note(found, len(shown)),
        plots=_plots(plots),
        tables=[*_size_tables(found), _speed_table(found, ways, facts), *_conversion_table(found)],
        layers=_layer_rows(found),
        recipe=_recipe_text(found),
        provenance=_provenance(found),
    )


def description(found: Evaluation) -> str:
    """What was evaluated, in a line."""
    checkpoint = found.run.checkpoint
    precision = (checkpoint.precision or Int4()).name
    rank = f", rank {checkpoint.rank}" if checkpoint.rank is not None else ""
    return f"{checkpoint.model_class} in {precision}{rank}, format {checkpoint.format.name}."


def _ways(found: Evaluation, more: Sequence[Variant]) -> list[Variant]:
    """The checkpoint first, the baselines last."""
    precision = (found.run.checkpoint.precision or Int4()).name
    own = Variant(CONVERTED, f"{TITLES[CONVERTED]} {precision}")
    known = {CONVERTED, *(way.key for way in more)}
    return [own, *more, *(Variant(key, TITLES[key]) for key in found.scores if key not in known)]


def _verdict(found: Evaluation) -> str:
    report = found.report
    missed = f" Gates missed: {'; '.join(report.gates_missed)}." if report.gates_missed else ""
    return f"{report.verdict}{missed}"


def _next(found: Evaluation) -> str:
    """The report's next step, worded for a reader who is already on the page."""
    what = "videos" if found.report.video else "images"
    return found.report.next.replace(f"look at {found.report.page}", f"look at the {what} below")


def _figures(found: Evaluation) -> list[Figure]:
    report, sqnr = found.report, found.report.layer_sqnr_db
    sizes = _sizes(found.run.checkpoint)
    worst = min(sqnr.per_layer, key=sqnr.per_layer.__getitem__)
    empty = report.sixteen_bit_images.meaningless
    figures = [
        Figure(
            "PSNR",
            f"{report.psnr_db.mean:.1f} dB",
            "meaningless: see the warning" if empty else _worst(report, "psnr_db"),
        ),
        Figure(
            "SSIM",
            f"{report.ssim.mean:.3f}",
            "meaningless: see the warning" if empty else _worst(report, "ssim"),
        ),
        Figure("smaller", f"{sizes.ratio:.2f}x", f"{bytes_text(sizes.input)} to {bytes_text(sizes.output)}"),
        Figure("layer SQNR, these prompts", f"{sqnr.mean:.1f} dB", f"worst {sqnr.min:.1f} dB, {worst}"),
    ]
    if isinstance(lpips := report.figures["lpips"], Summary):
        what = "video" if report.video else "image"
        figures.insert(2, Figure("LPIPS", f"{lpips.mean:.3f}", f"worst {what} {lpips.max:.3f}"))
    if (video := report.video) is not None:
        figures.insert(2, _video_figure("frame to frame", video.temporal_psnr_db, "PSNR of what moves"))
        if video.audio_snr_db is not None:
            figures.insert(3, _video_figure("sound", video.audio_snr_db, "SNR"))
    if (floor := report.noise_floor_psnr_db) is not None:
        exact = floor >= PSNR_CAP_DB
        value = "none" if exact else f"{floor:.1f} dB"
        remark = "a second run is bit-identical" if exact else "PSNR of a second run of the 16-bit model"
        figures.append(Figure("16-bit noise", value, remark))
    if (own := report.own_noise_psnr_db) is not None:
        figures.append(
            Figure("4-bit noise", f"{own:.1f} dB", "PSNR to itself with start noise off by one rounding")
        )
    if (outputs := report.output_sqnr_db) is not None:
        figures.append(
            Figure(
                "model output",
                f"{outputs.sum:.1f} dB",
                f"summed over the steps; {outputs.step:.1f} dB a step",
            )
        )
    return figures


def _worst(report: EvalReport, key: str) -> str:
    """The remark under PSNR or SSIM: the worst image, or the worst frame of all videos."""
    summary = report.figures[key]
    assert isinstance(summary, Summary)
    worst, what = summary.min, "image"
    if (video := report.video) is not None:
        worst = (video.worst_frame_psnr_db if key == "psnr_db" else video.worst_frame_ssim).min
        what = f"of {video.frames} frames a video"
    return f"worst {what} {METRICS[key].text(round(worst, 1 if key == 'psnr_db' else 3))}"


def _video_figure(label: str, summary: Summary, what: str) -> Figure:
    return Figure(label, f"{summary.mean:.1f} dB", f"{what}; worst video {summary.min:.1f} dB")


def _sizes(checkpoint: Checkpoint) -> ByteFacts:
    """Sizes of the quantized component, as the conversion's report counts them: whole files."""
    return sizes_of(checkpoint.state, checkpoint.source.file_bytes)


def _scores(found: Evaluation, ways: Sequence[Variant], facts: Mapping[str, BaselineFacts]) -> Table:
    """Means over the images or videos; columns that nothing was measured for are left out."""
    rows: dict[str, Figures] = {TITLES[SIXTEEN_BIT]: found.report.reference.figures}
    rows |= {way.title: facts[way.key].figures for way in ways}
    columns = [key for key in METRICS if any(row.get(key) is not None for row in rows.values())]
    videos = {way.title: facts[way.key].video for way in ways if facts[way.key].video}
    table = [
        [
            title,
            *(_cell(row.get(key), METRICS[key].digits) for key in columns),
            *(_cell(value, digits) for _, value, digits in video_columns(videos.get(title))),
        ]
        for title, row in rows.items()
        if any(value is not None for value in row.values())
    ]
    more = [heading for heading, _, _ in video_columns(next(iter(videos.values()), None))]
    return Table(
        f"Against the 16-bit {'videos' if videos else 'images'}, equal prompts and seeds",
        ["made by", *(METRICS[key].heading for key in columns), *more],
        table,
        f"Mean ± standard deviation over {'videos' if videos else 'images'}, with the 95 % confidence interval of the "
        "mean in brackets "
        "(bootstrap; including the 4-bit model's own noise, if it was measured).",
    )


def _cell(summary: Summary | float | None, digits: int) -> str:
    if summary is None:
        return ""
    if not isinstance(summary, Summary):
        return f"{summary:.{digits}f}"
    text = f"{summary.mean:.{digits}f} ± {summary.std:.{digits}f}"
    if summary.ci95 is None:
        return text
    low, high = summary.ci95
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _image_figures(found: Evaluation, ways: Sequence[Variant], index: int) -> dict[str, str]:
    return {way.key: _image_text(found.scores[way.key], index) for way in ways}


def _image_text(scores: Scores, index: int) -> str:
    text = f"{scores.per_image['psnr_db'][index]:.1f} dB, SSIM {scores.per_image['ssim'][index]:.3f}"
    if (video := scores.video) is not None:
        text += f", worst frame {min(video.frames['psnr_db'][index]):.1f} dB"
        text += f", frame to frame {video.temporal_psnr_db[index]:.1f} dB"
        if video.audio_snr_db:
            text += f", sound {video.audio_snr_db[index]:.1f} dB"
    return text


def _shown_note(found: Evaluation, shown: int) -> str:
    total = len(found.run.prompts)
    what = "videos" if found.report.video else "images"
    which = f"All {total} {what}" if shown == total else f"The {shown} of {total} {what}"
    frames = (
        f"Of each video, {SHOWN_FRAMES} frames at most, first to last; its link opens all of them, moving. "
    )
    order = "lowest PSNR first" if shown == total else "with the lowest PSNR, lowest first"
    return (
        f"{which}, {order}. {frames if found.report.video else ''}Drag the divider, or focus an image and use the "
        "arrow keys. Difference maps show the "
        "largest difference of the three channels, 8 times as bright. Large images are reduced and compressed here, "
        "after the difference maps were made; the links open the full-size ones in the report's folder."
    )


def _plots(folder: Path) -> list[Plot]:
    return [
        Plot(title, (folder / f"{name}.svg").read_text(encoding="utf-8"), text)
        for name, title, text in _PLOTS
        if (folder / f"{name}.svg").is_file()
    ]


def _size_tables(found: Evaluation) -> list[Table]:
    checkpoint = found.run.checkpoint
    sizes = _sizes(checkpoint)
    w4a4 = [plan for plan in checkpoint.layers if isinstance(plan, W4A4Plan)]
    size = Table(
        "Size of the quantized component",
        ["", "16-bit", "converted", "smaller"],
        [
            [
                ", ".join(found.run.source.components),
                bytes_text(sizes.input),
                bytes_text(sizes.output),
                f"{sizes.ratio:.2f}x",
            ]
        ],
    )
    linears = [*(plan.linear for plan in checkpoint.layers), *checkpoint.kept]
    weights = {linear.name: linear.in_features * linear.out_features for linear in linears}
    total = sum(weights.values())
    kinds = {
        "4-bit weights and activations": [plan.name for plan in w4a4],
        "4-bit weights": [plan.name for plan in checkpoint.layers if not isinstance(plan, W4A4Plan)],
        "kept at 16 bits": [linear.name for linear in checkpoint.kept],
    }
    layers = Table(
        "Precision of the linear layers",
        ["", "layers", "of their weights"],
        [
            [kind, str(len(names)), f"{sum(weights[name] for name in names) / total:.1%}"]
            for kind, names in kinds.items()
        ],
    )
    return [size, layers]


def _speed_table(found: Evaluation, ways: Sequence[Variant], facts: Mapping[str, BaselineFacts]) -> Table:
    run, reference = found.run, found.report.reference
    backend, per = run.backend, "per video" if found.report.video else "per image"
    times = {TITLES[SIXTEEN_BIT]: reference, **{way.title: facts[way.key] for way in ways}}
    on_cpu = run.device.type == "cpu"
    rows = [
        [
            title,
            seconds_text(taken.seconds_per_picture),
            *([_processor_time(taken)] if on_cpu else []),
            _speed(taken, reference),
        ]
        for title, taken in times.items()
        if taken.seconds_per_picture
    ]
    what = "videos" if found.report.video else "images"
    note = (
        f"Backend: {backend.name} ({backend.reason}). Times are taken while the {what} are generated, without warm-up "
        "or repetition, and include whatever else the machine does; svdq bench measures speed. The "
        "reference backend computes what the 4-bit runtimes compute, but not at their speed."
    )
    if busy := [title for title, taken in times.items() if taken.machine_was_busy]:
        note += (
            f" Kept waiting by other programs, so that its time says nothing of the model: {', '.join(busy)}."
        )
    processors = [f"processor time {per}"] if on_cpu else []
    return Table("Speed", ["made by", per, *processors, "speed against 16-bit"], rows, note)


def _processor_time(taken: ReferenceFacts | BaselineFacts) -> str:
    """Of all processors together."""
    return "" if (seconds := taken.processor_seconds_per_picture) is None else seconds_text(seconds)


def _speed(taken: ReferenceFacts | BaselineFacts, reference: ReferenceFacts) -> str:
    """How many times as fast as the 16-bit model, where the machine worked on nothing else both times."""
    own, base = taken.seconds_per_picture, reference.seconds_per_picture
    if not own or not base:
        return ""
    if taken.machine_was_busy or reference.machine_was_busy:
        return "" if taken is reference else f"not measured: {BUSY}"
    return f"{base / own:.2f}x"


def _conversion_table(found: Evaluation) -> list[Table]:
    """Time and memory of the conversion, if its report is stored with the checkpoint."""
    report = conversion_report(found.run.path)
    seconds = report.get("seconds")
    if not isinstance(seconds, Mapping):
        return []
    rows = [[str(stage), seconds_text(float(taken))] for stage, taken in seconds.items()]
    peak = report.get("peak")
    if isinstance(peak, Mapping) and isinstance(peak.get("ram_bytes"), int):
        rows.append(["peak RAM", bytes_text(peak["ram_bytes"])])
    return [Table("Conversion", ["stage", "took"], rows)]


def _layer_rows(found: Evaluation) -> list[LayerRow]:
    sqnr = found.report.layer_sqnr_db.per_layer
    best = max(max(sqnr.values()), 1.0)
    search = _searched(conversion_report(found.run.path))
    rows: list[LayerRow] = []
    for name, db in sorted(sqnr.items(), key=lambda item: item[1]):
        plan = found.run.checkpoint.by_name[name]
        is_w4a4 = isinstance(plan, W4A4Plan)
        kind, rank = ("weights, activations", str(plan.rank)) if is_w4a4 else ("weights", "")
        rows.append(LayerRow(name, kind, rank, f"{db:.1f}", max(0.0, db / best), search.get(name, "")))
    return rows


def _searched(report: Mapping[str, object]) -> dict[str, str]:
    """How each layer was found, in a few words: "smoothing by activations^0.50 / weights^0.25; learned, gptq"."""
    search = report.get("search")
    layers = search.get("layers") if isinstance(search, Mapping) else None
    if not isinstance(layers, Mapping):
        return {}
    found: dict[str, str] = {}
    for name, layer in cast("Mapping[str, Mapping[str, object]]", layers).items():
        taken = layer.get("steps_taken")
        steps = ", ".join(taken) if isinstance(taken, list) else ""
        parts = [_smoothing_text(str(layer.get("smoothing") or "")), steps]
        found[name] = "; ".join(part for part in parts if part)
    return found


def _recipe_text(found: Evaluation) -> str:
    recipe = (found.run.checkpoint.provenance or {}).get("recipe")
    if recipe is None:
        return "The checkpoint has no recipe: another tool made it."
    return json.dumps(recipe, indent=2, ensure_ascii=False)


def _provenance(found: Evaluation) -> Table:
    settings = found.run.settings
    recipe = found.run.recipe
    wanted = recipe.calibration
    said = {
        "checkpoint": str(found.run.path),
        "format": found.run.checkpoint.format.name,
        "source": recipe.model.source,
        "prompts": "" if wanted is None else str(wanted.prompts),
        "sampled with": f"{settings.steps} steps, guidance {settings.guidance}, {settings.width} x {settings.height} "
        f"pixels{f', {settings.frames} frames' if settings.frames else ''}, seeds {settings.seed} to "
        f"{settings.seed_of(len(found.run.prompts) - 1)}",
    }
    made = found.run.checkpoint.provenance or {}
    said |= {_MADE.get(key, key): value for key, value in made.items() if isinstance(value, str)}
    for name, fact in found.facts.items():
        if name == "checkpoint" and isinstance(fact, Mapping):
            said |= {f"sha256 of {file}": str(digest) for file, digest in fact.items()}
        elif isinstance(fact, str):
            said["sha256 of the source" if name == "source" else name] = fact
    return Table("Provenance", ["", ""], [[name, value] for name, value in said.items()], wraps=True)


# In words, what figures and records are called in JSON
_MISSING = {
    **{key: metric.title for key, metric in METRICS.items()},
    **BASELINE_TITLES,
    "noise_floor_psnr_db": "16-bit noise",
    "own_noise_psnr_db": "4-bit noise",
    "output_sqnr_db": "model output",
}
_MADE = {
    "svdq_version": "converted by svdq",
    "source_sha256": "sha256 of the model it was converted from",
    "calibration_sha256": "sha256 of its calibration",
    "fingerprint": "fingerprint (model, recipe and calibration)",
}


def _smoothing_text(stored: str) -> str:
    """ "grid a=0.60 b=0.00" in words."""
    found = re.fullmatch(r"grid a=([\d.]+) b=([\d.]+)", stored)
    return f"smoothing by activations^{found[1]} / weights^{found[2]}" if found else stored
