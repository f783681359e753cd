"""The whole model's output, 4-bit against 16-bit, on the 16-bit trajectory's own inputs.

Images of two runs drift apart: a small difference early on grows over the steps. Outputs at equal inputs do not, which
makes them the measure to compare conversions by. A sampler adds the outputs of all steps up, so what their errors have
in common counts more than what cancels: `sum` is the measure of the former.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdq_cli.errors import UsageError
from svdq_cli.evaluation.layers import ratio_db
from svdq_cli.pipelines.generate import generate_images
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.reconstruct import mapped, tensors_of
from svdq_cli.records import Observer
from svdq_cli.reports import OutputSqnr
from svdq_cli.storage.atomic import write_text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, slots=True, eq=False)
class OutputCall:
    """One call of a 16-bit denoiser, the pipeline's `component`, and what it gave, in host memory."""

    component: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def record_outputs(
    pipe: DiffusionPipeline,
    components: Sequence[str],
    prompts: Sequence[str],
    settings: SamplingSettings,
    observe: Observer,
) -> list[OutputCall]:
    """Every call of the denoisers of `pipe`, `components`, while `prompts` are sampled in one batch."""
    calls: list[OutputCall] = []
    alone = False
    copies: dict[int, tuple[Tensor, Tensor]] = {}  # the original keeps its id from being used again

    def to_host(tensor: Tensor) -> Tensor:
        # text embeddings are the same tensor in every step
        return copies.setdefault(id(tensor), (tensor, tensor.detach().cpu().clone()))[1]

    def note(
        component: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        found = tensors_of(output)
        if found:
            calls.append(
                OutputCall(
                    component, mapped(args, to_host), mapped(kwargs, to_host), found[0].detach().cpu().clone()
                )
            )

    models = {component: getattr(pipe, component) for component in components}
    handles = [
        model.register_forward_hook(partial(note, component), with_kwargs=True)
        for component, model in models.items()
    ]
    try:
        together = replace(settings, batch_size=len(prompts))
        generate_images(pipe, prompts, settings=together, stage="model outputs", observe=observe)
    except UsageError:
        if len(prompts) == 1:
            raise
        alone = True
    finally:
        for handle in handles:
            handle.remove()
    # a pipeline that takes one prompt at a time
    return record_outputs(pipe, components, prompts[:1], settings, observe) if alone else calls


@dataclass(frozen=True, slots=True)
class OutputErrors:
    """Sums of squares over all outputs of a trajectory (`signal`) and their errors (`noise`), and of what these add up
    to over the steps (`whole`, `lost`)."""

    signal: float
    noise: float
    whole: float
    lost: float

    @property
    def sqnr(self) -> OutputSqnr:
        """SQNR (dB) of one step's output, and of the sum over the steps."""
        return OutputSqnr(
            step=round(ratio_db(self.signal, self.noise), 3), sum=round(ratio_db(self.whole, self.lost), 3)
        )


def output_sqnr(
    models: Mapping[str, nn.Module], calls: Sequence[OutputCall], device: torch.device, *, steps: int
) -> OutputSqnr | None:
    """SQNR of other denoisers' outputs, by component, on the recorded calls. None without calls, and where outputs
    can't be summed."""
    found = output_errors(models, calls, device, steps=steps)
    return found.sqnr if found else None


def output_errors(
    models: Mapping[str, nn.Module], calls: Sequence[OutputCall], device: torch.device, *, steps: int
) -> OutputErrors | None:
    """Signal and error of other denoisers' outputs on the recorded calls, as sums of squares."""
    # calls of one step: guidance takes two
    each = len(calls) // steps if steps and len(calls) % steps == 0 else 1
    signal = noise = 0.0
    sums: list[tuple[Tensor, Tensor]] = []  # of the outputs and of the errors, for each call of a step
    with torch.no_grad():
        for index, call in enumerate(calls):
            given = mapped((call.args, call.kwargs), lambda tensor: tensor.to(device))
            exact = call.output.double()
            error = tensors_of(models[call.component](*given[0], **given[1]))[0].cpu().double() - exact
            signal += exact.square().sum().item()
            noise += error.square().sum().item()
            if index < each:
                sums.append((exact, error))
            elif sums[index % each][0].shape == exact.shape:
                before = sums[index % each]
                sums[index % each] = (before[0] + exact, before[1] + error)
            else:
                return None
    if not calls:
        return None
    whole = sum(exact.square().sum().item() for exact, _ in sums)
    lost = sum(error.square().sum().item() for _, error in sums)
    return OutputErrors(signal, noise, whole, lost)


def keep_outputs(path: Path, found: OutputSqnr | None) -> None:
    """Write the recorded calls, for a run that resumes later."""
    said = None if found is None else {"step": found.step, "sum": found.sum}
    write_text(path, json.dumps(said))


def kept_outputs(path: Path) -> OutputSqnr | None:
    """What `keep_outputs` wrote."""
    said = json.loads(path.read_text(encoding="utf-8"))
    return None if said is None else OutputSqnr(float(said["step"]), float(said["sum"]))
