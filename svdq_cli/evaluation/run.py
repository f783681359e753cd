"""Evaluate: is the checkpoint as good as its source?"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path

from svdq_cli.conversion.resume import say_what_is_kept
from svdq_cli.errors import CanceledRunError, InterruptedRunError, OutOfResourcesError, as_full_disk, stopped
from svdq_cli.evaluation.compare import compare_in
from svdq_cli.evaluation.image_store import RUN_FILE, require_own_folder
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.recipe import Recipe
from svdq_cli.records import Observer, ignore_events
from svdq_cli.reports import EvalReport
from svdq_cli.storage.atomic import disk_errors
from svdq_cli.storage.output_paths import require_places


def evaluate(
    path: Path,
    recipe: Recipe,
    *,
    report_folder: Path | None = None,
    without: Collection[str] = (),
    backend: str = "auto",
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> EvalReport:
    """Images of the 16-bit model (the recipe's source), of the baselines and of the checkpoint, at equal seeds.

    With `report_folder`: images, grid, figures, plots and the HTML report are kept there, and a run that was stopped
    continues where it stopped. `without`: passes to leave out (`OPTIONAL_PASSES`). `backend`: see `load_pipeline`.
    """
    if report_folder is None:
        with _full_disk_named(), tempfile.TemporaryDirectory(prefix="svdq-eval-") as folder:
            found = compare_in(
                *(Path(folder), path, recipe),
                without=without,
                backend=backend,
                options=options,
                observe=observe,
            )
            return found.report
    # Imports matplotlib, which takes a while
    from svdq_cli.evaluation.plot import search_of
    from svdq_cli.evaluation.write_report import PAGE_FILE, write_report

    with _images_kept(report_folder):
        # now, not after the models were read
        require_own_folder(report_folder)
        require_places([report_folder], folders=[True], inputs=[path], overwrite=False)
        search = search_of(path)  # refuses a damaged report now, not after the long work
        page = str(report_folder / PAGE_FILE)
        found = compare_in(
            *(report_folder, path, recipe),
            without=without,
            backend=backend,
            page=page,
            options=options,
            observe=observe,
        )
        write_report(report_folder, found, search=search)
    return found.report


@contextmanager
def _full_disk_named() -> Generator[None, None, None]:
    """Say where the images go that no `--report` keeps, when there is no room for them."""
    try:
        yield
    except Exception as error:
        cure = "free some space there, name another folder with TMPDIR, or keep the images with --report"
        if full := as_full_disk(error, Path(tempfile.gettempdir()), hint=cure):
            raise full from error
        raise


@contextmanager
def _images_kept(folder: Path) -> Generator[None, None, None]:
    """Add to an interruption's message that the images generated so far are kept."""
    try:
        with disk_errors(folder, option="--report"):
            yield
    except BaseException as error:
        refusal = stopped(error) or error
        may_go_on = isinstance(refusal, (CanceledRunError, InterruptedRunError, OutOfResourcesError))
        if may_go_on and (folder / RUN_FILE).is_file():
            said = f"{folder} keeps the images generated so far; run the same command again to continue"
            say_what_is_kept(refusal, said, "evaluate", ignore_events)
        if refusal is error:
            raise
        raise refusal from error
