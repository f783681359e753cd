"""The search step `output`: the last linear of each denoiser, which stays at 16 bits, is fitted to what 4-bit blocks
hand over."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import cast

import torch

from svdq_cli.conversion.block_by_block import Way, reconstructions
from svdq_cli.conversion.record import output_sample
from svdq_cli.conversion.work_folder import OUTPUTS, SolvedLayers, WorkFolder
from svdq_cli.errors import InputError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import Prepared
from svdq_cli.prepare.sampling import Sampling
from svdq_cli.reconstruct import Recording, fit_output
from svdq_cli.records import Event, Observer
from svdq_cli.reports import OutputSearch
from svdq_cli.source import prefix_of
from svdq_cli.source.shifted import with_values


def with_outputs_fitted(
    prepared: Prepared,
    sampling: Sampling,
    solved: SolvedLayers,
    *,
    options: RunOptions,
    device: torch.device,
    observe: Observer,
) -> tuple[Prepared, dict[str, OutputSearch]]:
    """The model with its last linears as they were fitted, and what that brought, by the linear: empty for a model that
    ends otherwise. What the work folder of `solved` holds already is not fitted again."""
    work, components = solved.work, prepared.source.components
    left = {name for name in components if not _is_fitted(work, name, observe)}

    def wanted(component: str, recording: Recording) -> bool:
        kept = {linear.name for linear in prepared.plan.kept}
        last = recording.block_graph.last_linear
        fitting = last is not None and prefix_of(components, component) + last in kept
        if component in left and not fitting:
            work.keep_tensors(OUTPUTS, component, {}, {})
        return component in left and fitting

    if left:
        sample = output_sample(prepared, sampling)
        way = Way(prepared, sampling, sample, solved, options, device, observe, tuned=False)
        for prefix, job in reconstructions(way, wanted):
            found = fit_output(job, observe=observe)
            tensors = {"weight": found.weight, "bias": found.bias}
            stored = {key: tensor for key, tensor in tensors.items() if tensor is not None}
            about = {"name": prefix + found.name, "search": asdict(found.search)}
            component = job.plan.components[0]
            work.keep_tensors(OUTPUTS, component, stored, about)
    source, searches = prepared.source, dict[str, OutputSearch]()
    for component in components:
        if not (about := work.about(OUTPUTS, component)):
            continue
        name, found = str(about["name"]), work.tensors(OUTPUTS, component)
        source = with_values(source, {f"{name}.{key}": tensor for key, tensor in found.items()})
        searches[name] = OutputSearch(**cast("dict[str, float]", about["search"]))
    return replace(prepared, source=source), searches


def _is_fitted(work: WorkFolder, component: str, observe: Observer) -> bool:
    """Whether a last linear is fitted already. A damaged file is discarded, with a warning."""
    if not work.has(OUTPUTS, component):
        return False
    try:
        work.tensors(OUTPUTS, component)
        work.about(OUTPUTS, component)
    except (InputError, KeyError, TypeError, ValueError) as error:
        observe(Event("warning", "reconstruct", detail=f"the end of {component} is fitted again: {error}"))
        work.discard(OUTPUTS, component)
        return False
    return True
