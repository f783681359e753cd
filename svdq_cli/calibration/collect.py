"""Activation statistics of shared inputs, taken by hooks while the pipeline generates its calibration images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from svdq_cli.calibration.covariance import CovarianceSum
from svdq_cli.calibration.row_sampling import RowSampling
from svdq_cli.errors import InputError, UsageError
from svdq_cli.pipelines.batches import Batch, split_batches
from svdq_cli.pipelines.encode import EncodedPrompts
from svdq_cli.pipelines.generate import denoise, generated_batches
from svdq_cli.pipelines.joint import denoisers_in
from svdq_cli.pipelines.settings import SamplingSettings
from svdq_cli.planning.image_entries import CallBatch, by_entry, call_batches
from svdq_cli.planning.pointwise import channels_last
from svdq_cli.records import ActivationStats, Observer, SharedInput, ignore_events

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

OnInput = Callable[[str, Tensor], None]  # name of the shared input, activation (..., K)


def collect_stats(
    pipe: DiffusionPipeline,
    model: nn.Module,
    inputs: Sequence[SharedInput],
    prompts: Sequence[str],
    *,
    sampling: SamplingSettings,
    rows: int,
    covariance_tokens: Mapping[str, int] | None = None,
    observe: Observer = ignore_events,
) -> dict[str, ActivationStats]:
    """Statistics of every input over whole denoising trajectories, in the order of `inputs`, all in memory.

    `model` is the pipeline's denoiser, or the `joint_model` of several. At most `rows` rows an input; fewer where an
    input has fewer tokens. `covariance_tokens`: by input, over how many tokens its covariance is taken, if any. The
    same arguments give the same bits. Raises InputError for a layer that the model lacks, that the pipeline never runs,
    or whose input is NaN or infinite.
    """
    if not prompts:
        raise UsageError("no prompt to calibrate with", hint="give at least one prompt")
    batches = split_batches(prompts, settings=sampling)
    spread = RowSampling(rows, len(prompts), sampling.seed, covariance_tokens or {})
    parts: dict[int, Part] = {}
    collect_parts(
        pipe,
        model,
        inputs,
        batches,
        sampling=sampling,
        spread=spread,
        parts=parts,
        observe=observe,
    )
    return {item.name: merged(item.name, [part[item.name] for part in parts.values()]) for item in inputs}


def collect_parts(
    pipe: DiffusionPipeline,
    model: nn.Module,
    inputs: Sequence[SharedInput],
    batches: Sequence[Batch],
    *,
    sampling: SamplingSettings,
    spread: RowSampling,
    parts: MutableMapping[int, Part],
    encoded: EncodedPrompts | None = None,
    observe: Observer = ignore_events,
) -> None:
    """Generate the `batches` that `parts` lacks, and store what each adds under the index of its first image.

    A part depends on its own images alone: not on the order, nor on which process generated the others.
    `encoded`: the prompts' embeddings, where the text encoders are gone. Raises as `collect_stats` does.
    """
    layers = {item.name: _layer(model, item.layers[0]) for item in inputs}
    readers = {(item.name, name): _layer(model, name) for item in inputs for name in item.layers}
    left = [batch for batch in batches if batch.first not in parts]
    if not left:
        return
    sharing, denoisers = _Sharing.of(model, inputs), denoisers_in(pipe).values()
    with inputs_seen(sharing.layers, sharing.compare):
        # several denoisers have their turns in other steps: nothing less than all of them shows how often they run
        turns = _turns_per_image(pipe, layers, left[0], sampling, encoded, whole=len(denoisers) > 1)
    tallies: dict[str, _Tally] = {}
    drawn = left[0]

    def begin(batch: Batch) -> None:
        nonlocal drawn
        drawn = batch
        tallies.update((name, _Tally()) for name in turns)

    def record(name: str, activation: Tensor) -> None:
        _add(name, tallies[name], activation, drawn, turns[name], spread, calls)

    def see(reader: tuple[str, str], output: Tensor) -> None:
        tallies[reader[0]].note_output(reader[1], output)

    def finish() -> None:
        _refuse_non_finite(tallies, layers)
        parts[drawn.first] = {name: _part(tally) for name, tally in tallies.items()}

    images = generated_batches(
        pipe,
        left,
        settings=sampling,
        total=sum(len(batch.prompts) for batch in batches),
        output_type="latent",
        stage="calibrate",
        observe=observe,
        encoded=encoded,
        on_batch=begin,
        on_step=lambda step: _refuse_non_finite(tallies, layers),
    )
    with call_batches(denoisers) as calls, inputs_seen(layers, record), _outputs_hooked(readers, see):
        for _ in images:
            finish()


@dataclass(frozen=True, slots=True, eq=False)
class InputPart:
    """What one batch of images adds to the statistics of one input. On the CPU."""

    abs_max: Tensor  # (K,) float32
    squares: Tensor  # (K,) float64, sum of x squared
    rows: Tensor  # (M, K) bfloat16, by image and turn
    tokens: int
    output_peaks: Mapping[str, float]  # the largest number in the output of each layer that reads the input
    # (M, K) bfloat16, by image and turn: more tokens, of which the covariance is taken
    covariance_rows: Tensor | None = None


Part = Mapping[str, InputPart]  # by the name of the shared input


def merged(name: str, parts: Iterable[InputPart]) -> ActivationStats:
    """Statistics of one input from all parts, in the order of their images."""
    kept: list[InputPart] = []
    covariance = CovarianceSum()
    for part in parts:
        if part.covariance_rows is not None:
            covariance.add(part.covariance_rows)
        kept.append(replace(part, covariance_rows=None))  # which together take more memory than all else
        del part
    tokens = sum(part.tokens for part in kept)
    squares = kept[0].squares
    for part in kept[1:]:  # one after the other: a sum whose order is fixed has the same bits everywhere
        squares = squares + part.squares
    rows = torch.cat([part.rows for part in kept])
    return ActivationStats(
        name=name,
        abs_max=torch.stack([part.abs_max for part in kept]).amax(0),
        second_moment=(squares / tokens).float(),
        rows=rows,
        tokens_seen=tokens,
        output_peaks={
            layer: max(part.output_peaks[layer] for part in kept) for layer in kept[0].output_peaks
        },
        covariance=covariance.covariance(more_than=len(rows)),
    )


@dataclass(slots=True)
class _Sharing:
    """Checks that layers said to share an input really read the same numbers, call for call."""

    layers: dict[str, nn.Module]  # of the inputs that several layers read, by layer name
    input_of: dict[str, SharedInput]
    calls: dict[str, int] = field(default_factory=dict)  # layer -> how often it was called
    # (input, call) -> who read what
    first: dict[tuple[str, int], tuple[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Sequence[SharedInput]) -> _Sharing:
        input_of = {name: item for item in inputs if len(item.layers) > 1 for name in item.layers}
        return cls({name: _layer(model, name) for name in input_of}, input_of)

    def compare(self, name: str, activation: Tensor) -> None:
        """Raises InputError, naming both layers, where they read different activations."""
        call = self.calls[name] = self.calls.get(name, 0) + 1
        item = self.input_of[name]
        other, seen = self.first.setdefault((item.name, call), (name, activation))
        if seen is not activation and not _same(seen, activation):
            raise InputError(
                f"layers {other} and {name} are planned to share an input, but they read different activations",
                hint="separate them in the recipe's layers: {match: MODULE, group: [LAYER]} gives LAYER its own input",
                where=name,
            )
        if all(self.calls.get(layer, 0) >= call for layer in item.layers):
            del self.first[item.name, call]


def _same(x: Tensor, y: Tensor) -> bool:
    # what is not a number is no other number either: that it should be one is said elsewhere
    return x.shape == y.shape and (torch.equal(x, y) or torch.equal(x.nan_to_num(), y.nan_to_num()))


@dataclass(slots=True)
class _Tally:
    """What has been seen of one input in the batch that is being generated. Everything stays on the model's device
    until the batch is done: a copy to the CPU in each call would make the GPU wait."""

    abs_max: Tensor | None = None  # (K,) float32
    squares: Tensor | None = None  # (K,) float64
    tokens: int = 0
    turns: dict[int, int] = field(default_factory=dict)  # image -> turns taken
    rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (image, turn) -> (M, K) bfloat16
    # the same, of which the covariance is taken
    covariance_rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)  # layer -> the largest number it gave

    def note_output(self, layer: str, output: Tensor) -> None:
        """Takes the largest number of a layer's `output`, of any shape, into account."""
        peak = torch.linalg.vector_norm(output, math.inf).float()
        self.outputs[layer] = torch.maximum(self.outputs[layer], peak) if layer in self.outputs else peak


def _add(
    name: str,
    tally: _Tally,
    activation: Tensor,
    batch: Batch,
    turns: int,
    spread: RowSampling,
    calls: CallBatch,
) -> None:
    entries, for_covariance = (
        by_entry(name, activation, len(batch.prompts), calls),
        spread.for_covariance(name),
    )
    flat = entries.flatten(0, 1)
    # norms over tokens: one pass over the activation each, without a float32 copy of it
    peak = torch.linalg.vector_norm(flat, math.inf, dim=0).float()
    squares = torch.linalg.vector_norm(flat, 2, dim=0, dtype=torch.float32).double().square()
    tally.abs_max = peak if tally.abs_max is None else torch.maximum(tally.abs_max, peak)
    tally.squares = squares if tally.squares is None else tally.squares + squares
    tally.tokens += flat.shape[0]
    for index, entry in enumerate(entries):
        image = batch.first + calls.image_of(index, len(entries), len(batch.prompts))
        turn = tally.turns.get(image, 0)
        tally.turns[image] = turn + 1
        for sampling, kept in ((spread, tally.rows), (for_covariance, tally.covariance_rows)):
            if sampling is None:
                continue
            chosen = sampling.tokens(image=image, turn=turn, turns=turns, count=entry.shape[0])
            if chosen:
                kept[image, turn] = entry[chosen].to(torch.bfloat16)


def _part(tally: _Tally) -> InputPart:
    assert tally.abs_max is not None  # the probe saw this input called
    assert tally.squares is not None
    width = tally.abs_max.shape[0]
    rows = _in_order(tally.rows)
    if rows is None:
        rows = torch.empty(0, width, dtype=torch.bfloat16)
    peaks = {layer: peak.item() for layer, peak in tally.outputs.items()}
    more = _in_order(tally.covariance_rows)
    return InputPart(tally.abs_max.cpu(), tally.squares.cpu(), rows, tally.tokens, peaks, more)


def _in_order(rows: Mapping[tuple[int, int], Tensor]) -> Tensor | None:
    """By image and turn, however they were batched; on the CPU."""
    return torch.cat([rows[key] for key in sorted(rows)]).cpu() if rows else None


def _turns_per_image(
    pipe: DiffusionPipeline,
    layers: Mapping[str, nn.Module],
    batch: Batch,
    settings: SamplingSettings,
    encoded: EncodedPrompts | None,
    *,
    whole: bool,
) -> dict[str, int]:
    """How often each input will be called for one image, known from one denoising step of the first batch, or from
    the `whole` of it.

    In the order of the calls, so that the first bad activation is found where it arises. Costs one denoising step, and
    finds a layer that the pipeline never runs before the long work begins.
    """
    seen: dict[str, int] = {}
    steps_done = 0

    def count(name: str, activation: Tensor) -> None:
        images = len(batch.prompts)
        seen[name] = seen.get(name, 0) + by_entry(name, activation, images, calls).shape[0] // images

    def stop(step: int) -> None:
        nonlocal steps_done
        steps_done = step
        # diffusers' own way to end a trajectory early; a pipeline that ignores it runs on and is counted in full
        pipe._interrupt = True  # pyright: ignore[reportAttributeAccessIssue]

    with call_batches(denoisers_in(pipe).values()) as calls, inputs_seen(layers, count):
        on_step = None if whole else stop
        denoise(pipe, batch, settings=settings, output_type="latent", encoded=encoded, on_step=on_step)
    for name in layers:
        if name not in seen:
            raise InputError(
                f"layer {name}: the pipeline never ran it"
                + (f" in {settings.steps} step{'s' * (settings.steps > 1)}" if whole else ""),
                hint="keep it at 16 bits (keep: true in the recipe's layers), or correct its name in the family file"
                if not whole
                else "sample with more steps (--steps): each denoiser runs only a part of them",
                where=name,
            )
    steps = int(getattr(pipe, "num_timesteps", settings.steps))
    # without step callbacks the whole trajectory was counted
    return {name: calls * steps // steps_done if steps_done else calls for name, calls in seen.items()}


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"layer {name}: {type(model).__name__} has no such layer",
            hint="the plan was made for another model; make it again from this one",
            where=name,
        ) from None


@contextmanager
def inputs_seen(layers: Mapping[str, nn.Module], on_input: OnInput) -> Iterator[None]:
    """Calls `on_input` with what each layer is about to read. The hooks are gone afterwards, whatever happens."""
    handles = []
    try:
        for name, layer in layers.items():

            def before(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                x = (args[0] if args else next(iter(kwargs.values()))).detach()
                on_input(name, channels_last(x) if isinstance(module, nn.Conv2d) else x)

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _outputs_hooked(
    layers: Mapping[tuple[str, str], nn.Module], on_output: Callable[[tuple[str, str], Tensor], None]
) -> Iterator[None]:
    """Calls `on_output` with what each layer, known by its input's name and its own, has computed."""
    handles = []
    try:
        for reader, layer in layers.items():

            def after(_: nn.Module, __: object, output: Tensor, reader: tuple[str, str] = reader) -> None:
                on_output(reader, output.detach())

            handles.append(layer.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_non_finite(tallies: Mapping[str, _Tally], layers: Mapping[str, nn.Module]) -> None:
    # NaN and infinity survive a maximum, so the peaks speak for every activation so far
    peaks = [tally.abs_max for tally in tallies.values() if tally.abs_max is not None]
    # one answer for all of them: each question makes the GPU finish what it is doing
    if not peaks or bool(torch.stack([torch.isfinite(peak).all() for peak in peaks]).all()):
        return
    name = next(
        n for n, t in tallies.items() if t.abs_max is not None and not torch.isfinite(t.abs_max).all()
    )
    dtype = next((parameter.dtype for parameter in layers[name].parameters()), None)
    raise InputError(
        f"layer {name}: its input holds NaN or infinity (the model runs in {str(dtype).split('.')[-1]})",
        hint="run the model in bfloat16 or float32 (model.dtype in the recipe); if it already does, "
        "a weight before this layer is damaged",
        where=name,
    )
