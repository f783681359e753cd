"""What the other processes of a run do: their part of the calibration images and of the layers.

The first process does the rest: it plans, merges the statistics, searches ranks, reconstructs blocks (effort best),
writes and checks the outputs. A process is done when no layer is left to take.
"""

from __future__ import annotations

from pathlib import Path

from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.conversion.allocation import kept_allocation
from svdq_cli.conversion.calibrate import BEGUN, calibration_run_of, generate_share
from svdq_cli.conversion.curves import choose_curves
from svdq_cli.conversion.move_means import with_means_moved
from svdq_cli.conversion.needs import given_statistics, needs_of
from svdq_cli.conversion.solve_layers import Statistics, solve_share
from svdq_cli.conversion.work_folder import WorkFolder
from svdq_cli.errors import SvdqError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared, prepare
from svdq_cli.recipe import Recipe
from svdq_cli.records import ignore_events
from svdq_cli.system.machine import resolve_device

CALIBRATED = "calibrated"  # topic: statistics and ranks are there


def share_calibrate(recipe: Recipe, *, options: RunOptions) -> None:
    """A helping process's part of `calibrate`. Raises InterruptedRunError where another process is lost."""
    prepared, begun = _begun(recipe, options, every_layer=True)
    calibration_run = calibration_run_of(
        prepared, options, ignore_events, source_sha256=str(begun["source_sha256"])
    )
    generate_share(
        calibration_run, WorkFolder(Path(str(begun["work"]))), options=options, observe=ignore_events
    )


def share_convert(recipe: Recipe, *, calibration: Path | None, options: RunOptions) -> None:
    """A helping process's part of `convert`. Raises InterruptedRunError where another process is lost."""
    team = options.team
    prepared, begun = _begun(recipe, options)
    work = WorkFolder(Path(str(begun["work"])))
    if begun["generates"]:
        calibration_run = calibration_run_of(
            prepared, options, ignore_events, source_sha256=str(begun["source_sha256"])
        )
        generate_share(calibration_run, work, options=options, observe=ignore_events)
    team.receive(CALIBRATED)
    statistics: Statistics | None = None
    given = given_statistics(recipe, calibration)
    needs = needs_of(prepared, given)
    if not needs.data_free:
        opened = given or open_calibration(work.calibration)
        statistics = Statistics(opened.digest, opened)
    device = resolve_device(options.device)
    prepared, statistics = with_means_moved(prepared, statistics)
    prepared, _ = kept_allocation(prepared, work) or (prepared, ())
    prepared, _ = choose_curves(prepared, statistics, device, ignore_events, options=options, work=work)
    solve_share(work, prepared, statistics, device, options=options)


def _begun(
    recipe: Recipe, options: RunOptions, *, every_layer: bool = False
) -> tuple[Prepared, dict[str, object]]:
    """The plan, made while the first process makes its own, and the message that one sends when it has started."""
    try:
        prepared = prepare(recipe, beside=options.beside, every_layer=every_layer)
    except SvdqError:
        options.team.receive(BEGUN)  # the first process refuses the same, and says so
        raise
    return prepared, options.team.receive(BEGUN)
