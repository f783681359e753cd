"""`svdq demo`: the whole job on the embedded model and on its stress variant, shown as images and a table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from svdq_cli.bench.cases import BenchSettings
from svdq_cli.bench.report import BenchReport
from svdq_cli.bench.run import bench_layers
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.card import CARD_FILE
from svdq_cli.conversion.convert import convert
from svdq_cli.evaluation.compare import Evaluation, compare_in
from svdq_cli.evaluation.grid import image_grid
from svdq_cli.evaluation.image_store import read_image
from svdq_cli.evaluation.images import summarize
from svdq_cli.evaluation.page import PAGE_IMAGE_BYTES, Page, ReportSection, Table, Variant, render_page
from svdq_cli.evaluation.passes import CONVERTED, NAIVE, SIXTEEN_BIT, generate_missing
from svdq_cli.evaluation.plot import search_of
from svdq_cli.evaluation.report_page import section_of
from svdq_cli.evaluation.score import score_pairs
from svdq_cli.evaluation.write_report import PAGE_FILE, footer, write_figures
from svdq_cli.inference.backend import compute_dtype
from svdq_cli.inference.load import load_pipeline
from svdq_cli.prepare.defaults import evaluation_recipe
from svdq_cli.prepare.locate import DEMO_SOURCES, locate_source
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.recipe import Calibration, Output, default_recipe, with_overrides
from svdq_cli.records import Event, Observer, ignore_events
from svdq_cli.reports import ConvertReport, Summary, json_text
from svdq_cli.storage.atomic import disk_errors, refuse_existing, whole_folder, write_text
from svdq_cli.storage.images import write_image
from svdq_cli.storage.output_paths import DEMO_REPORT, is_demo_folder, require_places
from svdq_cli.system.machine import resolve_device

DEMO_RANK = 16
EVAL_PROMPTS = 16
GRID_ROWS = 6
_CARD_TITLE = "\n# svdq demo model"  # of the embedded model's and of the stress variant's card
BENCH_SECONDS = 0.05  # a row: enough to show the order of magnitude
NVFP4 = "nvfp4"
_TITLES = {
    SIXTEEN_BIT: "16-bit",
    NAIVE: "naive int4",
    CONVERTED: "SVDQuant int4",
    NVFP4: "SVDQuant nvfp4",
}
_PAGE_TITLE = "svdq demo"
_PAGE_LEAD = (
    "The embedded model, a small trained FLUX.1-class pipeline, converted to 4 bits and compared "
    "with the 16-bit original on prompts used neither for training nor for calibration."
)
_PAGE_NEXT = (
    "look at the images below, worst images first; then convert a model of yours: "
    "svdq convert MODEL --prompts calib_prompts/general.txt -o OUT"
)


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One line of the demo's table. `bytes` are the transformer's, `seconds` what the conversion took."""

    source: str
    model: str
    psnr_db: Summary | None
    ssim: Summary | None
    layer_sqnr_db: float | None
    bytes: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What `svdq demo` made and measured. PSNR and SSIM are against the 16-bit images of the same source."""

    folder: str
    page: str
    grids: tuple[str, ...]
    checkpoints: tuple[str, ...]
    prompts: int
    rows: tuple[DemoRow, ...]
    bench: BenchReport
    seconds: float
    command: str = "demo"
    status: str = "ok"
    schema: int = 1


def demo(
    out: Path,
    *,
    sources: tuple[str, ...] = DEMO_SOURCES,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> DemoReport:
    """Calibrate once, convert to int4 and nvfp4, check, evaluate on held-out prompts; for each of `sources`."""
    started = time.monotonic()
    folders = [out / source.replace(":", "-") for source in sources]
    checkpoints = [folder / precision for folder in folders for precision in ("int4", NVFP4)]
    budget = PAGE_IMAGE_BYTES // len(sources)
    with _own_folder(out, overwrite=options.overwrite):
        told = [
            _one_source(source, folder, options, observe, budget=budget)
            for source, folder in zip(sources, folders, strict=True)
        ]
        speed = _bench(checkpoints[0], options, observe)
        report = DemoReport(
            str(out),
            str(out / PAGE_FILE),
            tuple(str(folder / "grid.png") for folder in folders),
            tuple(map(str, checkpoints)),
            EVAL_PROMPTS,
            tuple(row for each in told for row in each.rows),
            speed,
            time.monotonic() - started,
        )
        page = Page(_PAGE_TITLE, _PAGE_LEAD, [each.section for each in told], [_speed(speed)], footer())
        write_text(out / PAGE_FILE, render_page(page))
        write_text(out / DEMO_REPORT, json_text(report) + "\n")
    return report


@contextmanager
def _own_folder(out: Path, *, overwrite: bool) -> Generator[None, None, None]:
    """The demo's folder, removed again if the demo does not get to its end. What is in it is whole or absent."""
    refuse_existing(out, overwrite=overwrite)
    require_places([out], folders=[True], inputs=[], overwrite=overwrite, replaceable=is_demo_folder)
    with disk_errors(out):
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        try:
            yield
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise


def _bench(checkpoint: Path, options: RunOptions, observe: Observer) -> BenchReport:
    """The checkpoint's layers on the backend that is here, against torch's own linear."""
    opened = open_checkpoint(checkpoint)
    settings = BenchSettings(resolve_device(options.device), seconds_per_row=BENCH_SECONDS)
    return bench_layers(opened.layers, opened.solution, settings=settings, observe=observe)


@dataclass(frozen=True, slots=True)
class _Told:
    """What is told of one source: lines of the table, and a chapter of the page."""

    rows: tuple[DemoRow, ...]
    section: ReportSection


def _one_source(source: str, folder: Path, options: RunOptions, observe: Observer, *, budget: int) -> _Told:
    """Convert, generate images and evaluate. `budget`: bytes of the page for images."""
    folder.mkdir(parents=True)
    made = _conversions(source, folder, options, observe)
    observe(Event("note", source, detail="compare the images of the 16-bit and the converted models"))
    judged = with_overrides(
        evaluation_recipe(open_checkpoint(folder / "int4"), source), {"calibration.samples": EVAL_PROMPTS}
    )
    images = folder / "eval"
    # passes that a demo of a minute does without
    without = ("own-noise", "outputs")
    found = compare_in(
        images,
        folder / "int4",
        judged,
        without=without,
        page=str(folder.parent / PAGE_FILE),
        options=options,
        observe=observe,
    )
    found = _with_nvfp4(found, folder / NVFP4, observe)
    search = search_of(folder / "int4")
    write_figures(images, found, search=search)
    _write_grid(folder / "grid.png", found)
    section = section_of(
        found,
        plots=images,
        title=source if source == "demo" else f"{source}, the stress variant with strong activation outliers",
        key=source.replace(":", "-"),
        more_ways=[Variant(NVFP4, _TITLES[NVFP4])],
        budget=budget,
        page_folder=folder.parent,
    )
    # what the evaluation says next is how to upload the checkpoint, which nobody wants of a demo
    return _Told(_rows(source, found, made), replace(section, next=_PAGE_NEXT))


def _conversions(
    source: str, folder: Path, options: RunOptions, observe: Observer
) -> Mapping[str, ConvertReport]:
    """int4 and nvfp4 from one calibration, by precision."""
    recipe = with_overrides(
        default_recipe(source, calibration=Calibration()), {"quantization.rank": DEMO_RANK}
    )
    observe(Event("note", source, detail="calibrate, once for both conversions"))
    calibrate(recipe, folder / "calibration", options=options, observe=observe)
    made = {}
    for precision in ("int4", NVFP4):
        observe(Event("note", source, detail=f"convert to {precision}"))
        made[precision] = convert(
            with_overrides(
                recipe,
                {"quantization.precision": precision, "outputs": [Output(path=str(folder / precision))]},
            ),
            folder / precision,
            calibration=folder / "calibration",
            options=options,
            observe=observe,
        )
    return made


def _with_nvfp4(found: Evaluation, checkpoint: Path, observe: Observer) -> Evaluation:
    """The evaluation of the int4 checkpoint with the other one generated next to it."""
    run, image_store = found.run, found.image_store
    generate_missing(
        image_store,
        NVFP4,
        run,
        lambda: load_pipeline(checkpoint, device=run.device, dtype=compute_dtype(run.device)),
        observe,
    )
    scores = score_pairs(
        image_store, SIXTEEN_BIT, NVFP4, run.prompts, found.metrics, observe, stage="score SVDQuant nvfp4"
    )
    return replace(found, scores={**found.scores, NVFP4: scores})


def _write_grid(path: Path, found: Evaluation) -> None:
    titles = {
        way: title if way == SIXTEEN_BIT else f"{title}\n{_summary(found, way, 'psnr_db').mean:.1f} dB"
        for way, title in _TITLES.items()
    }
    columns = [
        (title, [read_image(found.image_store, way, row) for row in range(GRID_ROWS)])
        for way, title in titles.items()
    ]
    write_image(path, image_grid(columns, found.run.prompts[:GRID_ROWS]))


def _rows(source: str, found: Evaluation, made: Mapping[str, ConvertReport]) -> tuple[DemoRow, ...]:
    sizes = made["int4"].bytes
    precision_of = {CONVERTED: "int4", NVFP4: NVFP4}
    rows = [DemoRow(source, _TITLES[SIXTEEN_BIT], None, None, None, sizes.input, None)]
    for way in (NAIVE, CONVERTED, NVFP4):
        conversion = made[precision_of[way]] if way in precision_of else None
        rows.append(
            DemoRow(
                source,
                _TITLES[way],
                _summary(found, way, "psnr_db"),
                _summary(found, way, "ssim"),
                conversion.layer_sqnr_db.mean if conversion else None,
                conversion.bytes.output if conversion else sizes.output,
                conversion.seconds.total if conversion else None,
            )
        )
    return tuple(rows)


def _summary(found: Evaluation, way: str, metric: str) -> Summary:
    return summarize(found.scores[way].per_image[metric])


def _speed(bench: BenchReport) -> Table:
    """The converted layers against torch's own linear."""
    device = bench.device
    return Table(
        "Speed of converted layers",
        ["layer", "op", "precision", "M, K, N", "rank", "median", "against torch"],
        [
            [
                row.layer,
                row.op,
                row.precision,
                f"{row.m}, {row.k}, {row.n}",
                "" if row.rank is None else str(row.rank),
                f"{row.us.median:.0f} us",
                f"{row.ratio:.2f}x",
            ]
            for row in bench.rows
        ],
        f"{device.name}, {device.backend} backend, torch {device.torch}. {BENCH_SECONDS} s per row, enough for the "
        "order of "
        "magnitude. The reference backend computes what the 4-bit runtimes compute, but not at their speed.",
    )


def _is_exported_model(path: Path) -> bool:
    """Whether a folder is an exported demo model, recognized by its card: its other files are like any pipeline's."""
    card = path / CARD_FILE
    ours = card.is_file() and _CARD_TITLE in card.read_text(encoding="utf-8", errors="replace")
    return ours or not any(path.iterdir())


@dataclass(frozen=True, slots=True)
class ExportReport:
    path: str
    outliers: bool
    bytes: int
    command: str = "demo"
    status: str = "ok"
    schema: int = 1


def export_model(out: Path, *, outliers: bool, overwrite: bool) -> ExportReport:
    """Write the embedded model, or its stress variant, as an ordinary diffusers pipeline folder."""
    from svdq_cli.demo.outliers import export_demo

    locate_source("demo")  # refuses in words where the installation lacks the model
    refuse_existing(out, overwrite=overwrite)
    require_places([out], folders=[True], inputs=[], overwrite=overwrite, replaceable=_is_exported_model)
    with whole_folder(out, overwrite=overwrite) as partial:
        export_demo(partial / "model", outliers=outliers)
        for item in (partial / "model").iterdir():
            item.rename(partial / item.name)
        (partial / "model").rmdir()
    return ExportReport(str(out), outliers, sum(f.stat().st_size for f in out.rglob("*") if f.is_file()))
