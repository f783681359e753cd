"""`svdq demo`: the whole job on the embedded model and on its stress variant, shown as pictures and a table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.bench.report import BenchReport
from svdq_cli.bench.run import BenchSettings, bench_layers
from svdq_cli.calibrate.pipelines import draw
from svdq_cli.checkpoint import open_checkpoint
from svdq_cli.drawing import demo_calibration, evaluate_pictures, evaluation_recipe
from svdq_cli.errors import UsageError
from svdq_cli.evaluate.grid import picture_grid
from svdq_cli.evaluate.images import compare
from svdq_cli.loading import load_pipeline
from svdq_cli.locate import DEMO_SOURCES, locate_source
from svdq_cli.machine import resolve_device
from svdq_cli.pipeline import calibrate, convert
from svdq_cli.preparing import DEFAULT_OPTIONS, RunOptions, draw_settings
from svdq_cli.recipe import Output, default_recipe, with_overrides
from svdq_cli.records import Observer, Summary, ignore_events, json_text
from svdq_cli.source import open_source
from svdq_cli.writing import disk_errors, refuse_existing, whole_folder

DEMO_RANK = 16
EVAL_PROMPTS = 16
GRID_ROWS = 6
BENCH_SECONDS = 0.05  # a row: enough to show the order of magnitude


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
    """What `svdq demo` made and measured. PSNR and SSIM are against the 16-bit pictures of the same source."""

    folder: str
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
    rows: list[DemoRow] = []
    grids: list[str] = []
    checkpoints: list[str] = []
    with _own_folder(out, overwrite=options.overwrite):
        for source in sources:
            folder = out / source.replace(":", "-")
            rows += _one_source(source, folder, options, observe)
            grids.append(str(folder / "grid.png"))
            checkpoints += [str(folder / precision) for precision in ("int4", "nvfp4")]
        speed = _bench(Path(checkpoints[0]), options, observe)
        report = DemoReport(
            str(out),
            tuple(grids),
            tuple(checkpoints),
            EVAL_PROMPTS,
            tuple(rows),
            speed,
            time.monotonic() - started,
        )
        (out / "report.json").write_text(json_text(report) + "\n", encoding="utf-8")
    return report


@contextmanager
def _own_folder(out: Path, *, overwrite: bool) -> Generator[None, None, None]:
    """The demo's folder, removed again if the demo does not get to its end. What is in it is whole or absent."""
    refuse_existing(out, overwrite=overwrite)
    if out.exists() and not (out / "report.json").is_file():
        raise UsageError(
            f"{out}: not a folder that svdq demo wrote, so it is not replaced",
            hint="choose another name with -o",
            where=str(out),
            kind="output-exists",
        )
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


def _one_source(source: str, folder: Path, options: RunOptions, observe: Observer) -> list[DemoRow]:
    folder.mkdir(parents=True)
    recipe = with_overrides(default_recipe(source, calibration=demo_calibration()), rank=DEMO_RANK)
    calibrate(recipe, folder / "calibration", options=options, observe=observe)
    reports = {
        precision: convert(
            with_overrides(recipe, precision=precision, outputs=[Output(path=str(folder / precision))]),
            folder / precision,
            calibration=folder / "calibration",
            options=options,
            observe=observe,
        )
        for precision in ("int4", "nvfp4")
    }
    judged = with_overrides(evaluation_recipe(open_checkpoint(folder / "int4"), source), samples=EVAL_PROMPTS)
    evaluation = evaluate_pictures(folder / "int4", judged, options=options, observe=observe)
    report, pictures = evaluation.report, evaluation.pictures
    settings = draw_settings(judged, open_source(locate_source(source)))
    other = draw(
        load_pipeline(folder / "nvfp4", device=resolve_device(options.device)),
        pictures.prompts,
        settings=settings,
        stage="draw nvfp4",
        observe=observe,
    )
    nvfp4 = compare(pictures.sixteen_bit, other)
    naive = report.baselines["rtn"]
    picture_grid(
        [
            ("16-bit", pictures.sixteen_bit[:GRID_ROWS]),
            (f"naive int4\n{naive.psnr_db.mean:.1f} dB", pictures.naive[:GRID_ROWS]),
            (f"SVDQuant int4\n{report.psnr_db.mean:.1f} dB", pictures.converted[:GRID_ROWS]),
            (f"SVDQuant nvfp4\n{nvfp4.psnr.mean:.1f} dB", other[:GRID_ROWS]),
        ],
        pictures.prompts[:GRID_ROWS],
    ).save(folder / "grid.png")
    sizes = {precision: made.bytes for precision, made in reports.items()}
    return [
        DemoRow(source, "16-bit", None, None, None, sizes["int4"].input, None),
        DemoRow(source, "naive int4", naive.psnr_db, naive.ssim, None, sizes["int4"].output, None),
        DemoRow(
            source,
            "SVDQuant int4",
            report.psnr_db,
            report.ssim,
            report.layer_sqnr_db.mean,
            sizes["int4"].output,
            reports["int4"].seconds.total,
        ),
        DemoRow(
            source,
            "SVDQuant nvfp4",
            nvfp4.psnr,
            nvfp4.ssim,
            reports["nvfp4"].layer_sqnr_db.mean,
            sizes["nvfp4"].output,
            reports["nvfp4"].seconds.total,
        ),
    ]


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
    with whole_folder(out, overwrite=overwrite) as partial:
        export_demo(partial / "model", outliers=outliers)
        for item in (partial / "model").iterdir():
            item.rename(partial / item.name)
        (partial / "model").rmdir()
    return ExportReport(str(out), outliers, sum(f.stat().st_size for f in out.rglob("*") if f.is_file()))
