"""`svdq convert`: search, quantize, pack, check. What is finished is kept, so that a run that dies is gone on with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from svdq_cli import __version__
from svdq_cli.calibration.artefact import MANIFEST, Calibration, open_calibration
from svdq_cli.calibration.parts import PartFolder
from svdq_cli.calibration.prompts import prompts_digest
from svdq_cli.checkpoint.writer import Contents, report_path
from svdq_cli.conversion.allocation import allocate_ranks
from svdq_cli.conversion.calibrate import BEGUN, calibration_run_of, collect_calibration
from svdq_cli.conversion.card import card_path, model_cards
from svdq_cli.conversion.curves import choose_curves
from svdq_cli.conversion.fit_outputs import with_outputs_fitted
from svdq_cli.conversion.memory import reserved_ram
from svdq_cli.conversion.move_means import with_means_moved
from svdq_cli.conversion.needs import (
    GivenStatistics,
    Needs,
    given_statistics,
    needs_of,
    require_blocks_run,
    require_parts,
)
from svdq_cli.conversion.predict import Forecast, affordable_needs, disk_needs, require_memory
from svdq_cli.conversion.preflight import require_own_places
from svdq_cli.conversion.provenance import REPORTED, contents_before, contents_of
from svdq_cli.conversion.publish import Outputs, finished_outputs, gated, write_reports_beside
from svdq_cli.conversion.ranges import range_warnings
from svdq_cli.conversion.read_weights import require_in_range
from svdq_cli.conversion.resume import NAMING, kept_work, names_of, require_new, work_beside
from svdq_cli.conversion.size_budget import require_search
from svdq_cli.conversion.solve_layers import Statistics, load_solved, solve_into, solved_elsewhere
from svdq_cli.conversion.text_encoders import FourBitEncoder, quantize_encoders
from svdq_cli.conversion.tune_model import tune_denoisers
from svdq_cli.conversion.work_folder import (
    LAYERS,
    TUNED,
    Identity,
    SolvedLayers,
    WorkFolder,
    remove_finished,
)
from svdq_cli.conversion.workers import CALIBRATED
from svdq_cli.errors import InputError
from svdq_cli.pipelines.batches import split_batches
from svdq_cli.pipelines.settings import settings_json
from svdq_cli.prepare.facts import (
    layer_counts,
    layer_sqnr,
    model_facts,
    rank_facts,
    search_facts,
    sizes_of,
)
from svdq_cli.prepare.options import DEFAULT_OPTIONS, RunOptions
from svdq_cli.prepare.prepare import Prepared, prepare, prompts_of, warnings_of
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.prepare.sources import source_of
from svdq_cli.recipe import Recipe, embedded, resolved
from svdq_cli.records import Event, LayerReport, LayerSolution, Observer, ignore_events
from svdq_cli.reports import ConvertReport, ConvertSeconds, OutputSearch, TuningSearch
from svdq_cli.source import components_digest, file_sha256, source_digest
from svdq_cli.storage.atomic import remove_leftovers, require_disk
from svdq_cli.storage.output_paths import name_warnings, require_name
from svdq_cli.system.allocator import return_freed_memory
from svdq_cli.system.machine import limit_vram, peak_memory, resolve_device
from svdq_cli.system.threads import in_background


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion before its first layer: what is known of it, and how it is run."""

    prepared: Prepared
    paths: tuple[Path, ...]  # one for each output
    digest: str  # of the source's weights
    needs: Needs
    device: torch.device
    options: RunOptions
    observe: Observer
    reserved: int  # bytes of host memory, of `reserved_ram`
    replaces: bool = False  # outputs that already exist
    warnings: list[str] = field(default_factory=list[str])

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @property
    def work(self) -> Path:
        """Next to the first output, hidden, unless the user chooses a path."""
        return work_beside(self.paths[0], self.options)

    def warn(self, warnings: tuple[str, ...]) -> None:
        for warning in warnings:
            self.warnings.append(warning)
            self.observe(Event("warning", "convert", detail=warning))


@dataclass(frozen=True, slots=True)
class Solved:
    """All layers, and how they came to be."""

    prepared: Prepared  # with the ranks that were searched
    solutions: Mapping[str, LayerSolution]
    reports: list[LayerReport]
    tuning: Mapping[str, TuningSearch]
    outputs: Mapping[str, OutputSearch]
    statistics: Statistics | None
    taken_over: int  # layers that an earlier run had solved
    calibrate_seconds: float
    solve_seconds: float


def convert(
    recipe: Recipe,
    out: Path | tuple[Path, ...],
    *,
    calibration: Path | None = None,
    options: RunOptions = DEFAULT_OPTIONS,
    observe: Observer = ignore_events,
) -> ConvertReport:
    """Search, quantize, pack, check. `out`: one path for each of the recipe's outputs.

    All outputs are packed from one search. None appears under its name before all are whole and checked. What is
    finished is kept in a work folder, from which `options.resume` continues; it is removed with the last step.
    """
    started = time.monotonic()
    job = begin(recipe, (out,) if isinstance(out, Path) else out, calibration, options, observe)
    with _work_of(job) as work:
        solved = _solve(job, work)
        begun = time.monotonic()
        encoders = quantize_encoders(
            job.prepared,
            work,
            needs=job.needs,
            device=job.device,
            options=options,
            observe=job.observe,
            warn=job.warn,
        )
        solved = replace(solved, solve_seconds=solved.solve_seconds + time.monotonic() - begun)
        contents = _contents(job, solved)
        with finished_outputs(
            # checked against the source as it is: what a user gives to check and eval
            replace(solved.prepared, source=job.prepared.source),
            job.paths,
            contents,
            encoders,
            overwrite=job.replaces,
            observe=observe,
        ) as outputs:
            report = gated(_report(job, solved, contents, encoders, outputs, started), recipe)
            cards = model_cards(
                report,
                job.prepared.settings.dtype,
                pipeline=job.prepared.source.pipeline,
                beside=options.beside,
            )
            outputs.write_reports(report, cards)
            work.keep_json(NAMING, names_of(job.paths))
        write_reports_beside(job.prepared.targets, job.paths, report, cards)
    return report


def begin(
    recipe: Recipe,
    paths: tuple[Path, ...],
    calibration: Path | None,
    options: RunOptions,
    observe: Observer,
) -> Job:
    """Everything that can be refused before the first layer is, is refused here."""
    for path in paths:
        require_name(path)
    remove_finished(work_beside(paths[0], options))
    replaces = require_new(paths, options)
    source = source_of(recipe, options)
    with in_background(partial(source_digest, source)) as digesting:  # prepare imports diffusers, on one core
        prepared = prepare(recipe, beside=options.beside, source=source)
        _require_weights(prepared)
        require_own_places(prepared, paths, calibration, overwrite=replaces)
        given = given_statistics(recipe, calibration)
        needs = needs_of(prepared, given)
        require_parts(prepared, needs)
        if needs.prompts:
            prepared = replace(prepared, prompts=prompts_of(prepared, options, observe))
        digest = digesting.result()
    if calibration is not None and given is not None:
        _require_made_for(prepared, calibration, given, digest)
    if prepared.settings.dtype is torch.float16:
        require_in_range(source, torch.float16)
    return_freed_memory()  # of the digest: what a process holds counts against --max-ram
    job = Job(
        prepared=prepared,
        paths=paths,
        digest=digest,
        needs=needs,
        device=resolve_device(options.device),
        options=options,
        observe=observe,
        reserved=reserved_ram(),
        replaces=replaces,
    )
    affordable, without = affordable_needs(Forecast(prepared, needs, job.device, options))
    job, needs = replace(job, needs=affordable), affordable
    require_blocks_run(prepared, needs)
    require_search(prepared, needs, lambda: contents_before(prepared, options, digest=digest))
    forecast = Forecast(prepared, needs, job.device, options)
    require_memory(forecast)
    limit_vram(job.device, options.max_vram)
    require_disk(disk_needs(forecast, paths, job.work))
    job.warn((*warnings_of(prepared, data_free=needs.data_free), *without))
    job.warn(name_warnings(paths, folders=[not target.format.single_file for target in prepared.targets]))
    if needs.data_free and calibration is not None:
        job.warn((f"{calibration}: not used, because effort datafree takes no calibration",))
    return job


def _require_weights(prepared: Prepared) -> None:
    """InputError for a model without weights."""
    if not prepared.source.tensors:
        raise InputError(
            f"{prepared.source.path}: there are no weights in this folder, only a config",
            hint="give the folder that holds the weights",
            where=str(prepared.source.path),
        )


def _require_made_for(prepared: Prepared, path: Path, given: Calibration, digest: str) -> None:
    """InputError for an artefact of other weights."""
    made_for = given.manifest.facts
    if made_for.source_sha256 != digest:
        raise InputError(
            f"{path}: this calibration was made with different weights ({made_for.model_class}, "
            f"sha256 {str(made_for.source_sha256)[:12]}), not with {prepared.source.path} ({digest[:12]})",
            hint="run svdq calibrate on this model",
            where=str(path),
        )


# ------------------------------------------------------------------------------------------------- the work folder


def identity_of(job: Job) -> Identity:
    """Everything that a solved layer depends on. Work of one identity can be gone on with, to the same bytes."""
    recipe = embedded(job.recipe, source="")
    return {
        "svdq version": __version__,
        "torch version": torch.__version__,
        "device": job.device.type,
        "model sha256": job.digest,
        "calibration": _calibration_identity(job),
        "recipe": {key: value for key, value in recipe.items() if key != "version"},
        "formats": [target.format.name for target in job.prepared.targets],
        **_encoders_identity(job),
    }


def _encoders_identity(job: Job) -> Mapping[str, object]:
    """Weights of text encoders, and the prompts that they are rounded for."""
    encoders = job.prepared.encoders
    if not encoders:
        return {}
    prompts = None if job.prepared.prompts is None else prompts_digest(job.prepared.prompts.texts)
    weights = {plan.component: file_sha256(*plan.files) for plan in encoders}
    return {"text encoders": {"sha256": weights, "prompts sha256": prompts}}


def _calibration_identity(job: Job) -> Mapping[str, object] | None:
    if job.needs.data_free:
        return None
    given = job.needs.statistics
    artefact = {"sha256": given.artefact.digest} if isinstance(given, GivenStatistics) else {}
    images = _sampling_identity(job, job.needs.images) if job.needs.images else {}
    return {**artefact, **images}


def _sampling_identity(job: Job, sampling: Sampling) -> Mapping[str, object]:
    """The prompts, other components and sampling settings of the calibration images."""
    prompts = prompts_of(job.prepared, job.options, ignore_events)
    return {
        "prompts sha256": prompts_digest(prompts.texts),
        "pipeline sha256": components_digest(job.prepared.source),
        **settings_json(sampling.settings),
    }


def _batch_count(job: Job) -> int:
    """How many batches of images the calibration consists of."""
    prompts, sampling = job.prepared.prompts, job.prepared.sampling
    if prompts is None or sampling is None:
        return 0
    return len(split_batches(prompts.texts, settings=sampling.settings))


@contextmanager
def _work_of(job: Job) -> Iterator[WorkFolder]:
    """The job's work folder, once no leftovers of a killed run are in the way."""
    layer_groups = len(job.prepared.plan.layer_groups(data_free=job.needs.data_free))

    def kept(work: WorkFolder) -> str:
        said = [f"{len(work.finished(LAYERS))} of {layer_groups} layer groups solved"]
        if (work.calibration / MANIFEST).is_file():
            said = ["the calibration statistics", *said]
        elif images := len(PartFolder(work.images)):
            said = [f"{images} of {_batch_count(job)} batches of calibration images"]
        if tuned := len(work.finished(TUNED)):
            said.append(f"{tuned} tuned model{'s' * (tuned > 1)}")
        return " and ".join(said)

    with kept_work(
        job.work, identity_of(job), options=job.options, stage="convert", kept=kept, observe=job.observe
    ) as work:
        if job.options.resume or job.options.overwrite:
            for target, path in zip(job.prepared.targets, job.paths, strict=True):
                remove_leftovers(path)
                if target.format.single_file:
                    remove_leftovers(report_path(path, target.format))
                    remove_leftovers(card_path(path))
        yield work


# ------------------------------------------------------------------------------------------------- the layers


def _solve(job: Job, work: WorkFolder) -> Solved:
    began = time.monotonic()
    _tell_begun(job, work)
    statistics = None if job.needs.data_free else _statistics(job, work)
    calibrated = time.monotonic()
    if statistics is not None and isinstance(statistics.of, Calibration):
        seen = statistics.of.manifest.inputs
        job.warn(range_warnings(job.prepared.plan, seen, job.prepared.settings.dtype))
    prepared, statistics = with_means_moved(job.prepared, statistics)
    if prepared.source.moved:
        job.warn((_MOVED,))
    prepared, warnings = allocate_ranks(
        prepared,
        statistics,
        job.needs.gains,
        job.device,
        job.observe,
        contents=lambda: contents_before(prepared, job.options, digest=job.digest),
        options=job.options,
        work=work,
    )
    prepared, left_over = choose_curves(
        prepared, statistics, job.device, job.observe, options=job.options, work=work
    )
    job.options.team.broadcast(CALIBRATED, {})
    job.warn((*warnings, *left_over))
    taken_over = solve_into(
        work, prepared, statistics, job.device, job.observe, options=job.options, reserved=job.reserved
    )
    solutions, reports = load_solved(prepared.plan, work, data_free=job.needs.data_free)
    job.warn(solved_elsewhere(reports, job.device))
    found = Solved(
        prepared=prepared,
        solutions=solutions,
        reports=reports,
        tuning={},
        outputs={},
        statistics=statistics,
        taken_over=taken_over,
        calibrate_seconds=calibrated - began,
        solve_seconds=0.0,
    )
    found = _beside_the_16bit_model(job, found, solutions)
    return replace(found, solve_seconds=time.monotonic() - calibrated)


def _beside_the_16bit_model(job: Job, solved: Solved, solutions: SolvedLayers) -> Solved:
    """Solved layers with what needs both models side by side: the 4-bit one tuned, its last linear fitted."""
    if job.needs.tuning and solved.statistics is not None:
        solutions, reports, tuning = tune_denoisers(
            solved.prepared,
            job.needs.tuning,
            solved.statistics,
            solutions,
            solved.reports,
            options=job.options,
            device=job.device,
            observe=job.observe,
        )
        solved = replace(solved, solutions=solutions, reports=reports, tuning=tuning)
    if job.needs.output:
        prepared, outputs = with_outputs_fitted(
            solved.prepared,
            job.needs.output,
            solutions,
            options=job.options,
            device=job.device,
            observe=job.observe,
        )
        solved = replace(solved, prepared=prepared, outputs=outputs)
    return solved


_MOVED = (
    "means of inputs were moved into biases. A LoRA that another runtime loads lacks its part of these means, so "
    "merge LoRAs here (--lora) or with svdq lora"
)


def _tell_begun(job: Job, work: WorkFolder) -> None:
    """The other processes learn where the work is, and whether images are generated for it."""
    generates = job.needs.calibrates is not None and not (work.calibration / MANIFEST).is_file()
    begun = {"work": str(work.path.resolve()), "source_sha256": job.digest, "generates": generates}
    job.options.team.broadcast(BEGUN, begun)


def _statistics(job: Job, work: WorkFolder) -> Statistics:
    """The calibration statistics: those given, or those generated once into the work folder."""
    given = job.needs.statistics
    if isinstance(given, GivenStatistics):
        opened = given.artefact
    else:
        if not (work.calibration / MANIFEST).is_file():
            calibration_run = calibration_run_of(
                job.prepared, job.options, job.observe, source_sha256=job.digest
            )
            collect_calibration(
                work.calibration, calibration_run, work, options=job.options, observe=job.observe
            )
        opened = open_calibration(work.calibration)
    return Statistics(opened.digest, opened)


# ------------------------------------------------------------------------------------------------- what comes out


def _contents(job: Job, solved: Solved) -> Contents:
    return contents_of(
        solved.prepared,
        job.options,
        digest=job.digest,
        calibration=solved.statistics.digest if solved.statistics else None,
        solutions=solved.solutions,
        weight_errors={report.name: report.weight_error for report in solved.reports},
        fitted=[name for name, search in solved.outputs.items() if search.ridge is not None],
    )


def _report(
    job: Job,
    solved: Solved,
    contents: Contents,
    encoders: Sequence[FourBitEncoder],
    outputs: Outputs,
    started: float,
) -> ConvertReport:
    prepared, recipe = solved.prepared, job.recipe
    assert contents.provenance is not None
    return ConvertReport(
        status="ok",
        outputs=outputs.files,
        model=model_facts(prepared, job.digest),
        read_as=prepared.source.kind,
        precision=recipe.quantization.precision,
        effort="datafree" if job.needs.data_free else recipe.quantization.effort,
        data_free=job.needs.data_free,
        rank=rank_facts(prepared),
        layers=layer_counts(prepared.plan),
        layer_sqnr_db=layer_sqnr(solved.reports),
        search=search_facts(solved.reports, solved.tuning, solved.outputs),
        bytes=sizes_of(prepared.inventory.state, outputs.files[0].bytes),
        seconds=ConvertSeconds(
            calibrate=solved.calibrate_seconds,
            solve=solved.solve_seconds,
            pack=outputs.pack_seconds,
            check=outputs.check_seconds,
            total=time.monotonic() - started,
        ),
        peak=peak_memory(),
        fingerprint=str(contents.provenance["fingerprint"]),
        provenance={key: contents.provenance[key] for key in REPORTED},
        svdq_version=__version__,
        recipe=resolved(recipe),
        warnings=tuple(job.warnings),
        layers_taken_over=solved.taken_over,
        text_encoders={encoder.plan.component: encoder.facts for encoder in encoders},
    )
