"""A text encoder's weights to NF4: tensor by tensor to nearest, or block by block for what prompts make of them.

Calibrated, every block is run twice: with its own weights, to see what its layers read, and with the 4-bit weights, so
that the next block sees what it will see. Some prompts are held out of the rounding and run along twice in the same
batch, with 16-bit and with 4-bit blocks: how far apart the two end is how good the encoder is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from svdq_cli.checkpoint.nf4_layers import encode
from svdq_cli.checkpoint.text_encoders import EncoderLayer, EncoderPlan
from svdq_cli.conversion.encoder_blocks import own_weights, run_by_block
from svdq_cli.conversion.read_weights import require_finite
from svdq_cli.errors import InputError
from svdq_cli.pipelines.encoder_calls import EncoderCall
from svdq_cli.records import Event, Observer, ignore_events
from svdq_cli.solve.nf4 import SCALE_FACTORS, Nf4Solution, nearest, solve_for_rows
from svdq_cli.solve.smoothing_methods import evenly
from svdq_cli.solve.work import Work
from svdq_cli.source import TensorEntry
from svdq_cli.storage.atomic import whole_file
from svdq_cli.storage.tensor_file import TensorWriter, write_tensors

MOST_ROWS = 8192  # of an input that a layer is rounded for
MOST_TOKENS = 8192  # of all prompts together
LEAST_TOKENS = 512
HELD_OUT = 4  # prompts
_FACTORED = 24  # bytes of every number of second moments while they are factored
_ROWS_AT_ONCE = 1 << 22  # numbers of a weight that is read in parts


@dataclass(frozen=True, slots=True)
class EncoderFigures:
    """How near a 4-bit text encoder is to its source. `hidden`: SQNR of the hidden states of held-out prompts after
    every block, in dB, empty where none were; `layers`: SQNR of each layer's outputs, or of its weights without
    calibration."""

    calibrated: bool
    layers: Mapping[str, float]
    hidden: Sequence[float]


@dataclass(frozen=True, slots=True)
class Budget:
    """What calibration may take. `moments`: bytes of second moments while they are factored; an input that is too wide
    is rounded without them."""

    tokens: int  # of all prompts together
    moments: float


UNLIMITED = Budget(MOST_TOKENS, math.inf)


def budget_of(plan: EncoderPlan, free: int) -> Budget | None:
    """What `free` bytes leave beside the weights that are in memory at once; None where that is too little for a block
    and its inputs."""
    left = free - _weights_bytes(plan)
    tokens = min(MOST_TOKENS, int(left / 2 / _token_bytes(plan)))
    return Budget(tokens, left / 2) if tokens >= LEAST_TOKENS else None


def calibration_bytes(plan: EncoderPlan) -> int:
    """What rounding for prompts takes where nothing limits it."""
    widest = max(layer.in_features for layer in plan.layers if layer.block is not None)
    return _weights_bytes(plan) + MOST_TOKENS * _token_bytes(plan) + _FACTORED * widest**2


def encoder_work(plan: EncoderPlan, *, calibrated: bool) -> Work:
    """What rounding an encoder takes, in operations. Layers of one module with one width count as reading one input."""
    total = Work()
    inputs: set[tuple[str, int]] = set()
    for layer in plan.layers:
        size, width = layer.in_features * layer.out_features, layer.in_features
        total += Work(quantized=len(SCALE_FACTORS) * size, compared=size)
        if calibrated and layer.block is not None:
            passes = 2 * 2 * MOST_TOKENS * size
            total += Work(gptq=size, matmul=passes, calls=10 * width)
            inputs.add((layer.name.rpartition(".")[0], width))
    moments = sum(width**2 for _, width in inputs)
    return total + Work(matmul=2 * MOST_ROWS * moments, factored=3 * sum(width**3 for _, width in inputs))


def _weights_bytes(plan: EncoderPlan) -> int:
    """Weights outside the blocks and, of one block, its own, what they become, and a copy of those that are solved at
    once; in float32, as a CPU computes."""
    inside = {layer.tensor for layer in plan.layers if layer.block is not None}
    sizes = {name: 4 * math.prod(entry.shape) for name, entry in plan.tensors.items()}
    block = max(
        sum(sizes[layer.tensor] for layer in plan.layers if layer.block == each) for each in plan.blocks
    )
    return sum(size for name, size in sizes.items() if name not in inside) + 3 * block


def _token_bytes(plan: EncoderPlan) -> int:
    """Inputs and outputs of a block's layers for one token."""
    first = plan.blocks[0]
    return 4 * sum(layer.in_features + layer.out_features for layer in plan.layers if layer.block == first)


def write_encoder(
    path: Path,
    plan: EncoderPlan,
    call: EncoderCall | None,
    *,
    device: torch.device,
    budget: Budget = UNLIMITED,
    plain: bool = False,
    observe: Observer = ignore_events,
) -> EncoderFigures:
    """Writes the 4-bit weights of `plan` to the file `path`, whole or not at all.

    `call`: what the pipeline gives the encoder for the calibration prompts; None rounds to nearest. `plain`: nearest
    with each block's largest magnitude as its scale, as bitsandbytes does, to compare with.
    """
    progress = _Progress(plan, observe)
    with whole_file(path) as partial, write_tensors(partial, plan.specs, {"format": "pt"}) as writer:
        sink = _Sink(plan, writer, progress)
        hidden: tuple[float, ...] = ()
        if call is not None:
            hidden = _calibrated(plan, call, sink, device=device, budget=budget, plain=plain)
        for layer in plan.layers:
            if layer.name not in sink.errors:
                entry = plan.tensors[layer.tensor]
                rows = _Streamed(layer.tensor, entry, device)
                solution = nearest(rows, plain=plain)
                sink.take(layer, solution, _weight_sqnr(rows, solution))
        packed = {layer.tensor for layer in plan.layers}
        for name, entry in plan.tensors.items():
            if name not in packed:
                writer.write(
                    name,
                    _in_range(
                        require_finite(entry.read(), name, entry), name, entry, plan.stored_dtype(entry)
                    ),
                )
    progress.end()
    return EncoderFigures(call is not None, sink.errors, hidden)


@dataclass(slots=True)
class _Progress:
    plan: EncoderPlan
    observe: Observer
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.observe(Event("start", "encoder", 0, len(self.plan.layers), self.plan.component))

    def advance(self, layer: str) -> None:
        self.done += 1
        seconds = time.monotonic() - self.started
        detail = f"{self.plan.component} {layer}"
        self.observe(Event("advance", "encoder", self.done, len(self.plan.layers), detail, seconds))

    def end(self) -> None:
        count = len(self.plan.layers)
        seconds = time.monotonic() - self.started
        self.observe(Event("end", "encoder", count, count, self.plan.component, seconds))


@dataclass(slots=True)
class _Sink:
    """Takes solved layers into the file."""

    plan: EncoderPlan
    writer: TensorWriter
    progress: _Progress
    errors: dict[str, float] = field(default_factory=dict[str, float])

    def take(self, layer: EncoderLayer, solution: Nf4Solution, sqnr_db: float) -> None:
        for name, tensor in encode(layer.tensor, solution, self.plan.dtype).items():
            self.writer.write(name, tensor)
        self.errors[layer.name] = round(sqnr_db, 3)
        self.progress.advance(layer.name)


@dataclass(frozen=True, slots=True)
class _Streamed:
    """A stored weight whose rows are read when they are asked for, float32."""

    name: str
    entry: TensorEntry
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.entry.shape)

    def __len__(self) -> int:
        return self.entry.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(len(self))
        return (
            require_finite(self.entry.read_rows(start, stop), self.name, self.entry).to(self.device).float()
        )


def _weight_sqnr(rows: _Streamed, solution: Nf4Solution) -> float:
    signal = noise = 0.0
    scales = solution.scales.values.view(len(rows), -1)
    step = max(1, _ROWS_AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        weight = rows[part]
        signal += float(weight.square().sum())
        noise += float((weight - solution.rows(part, scales)).square().sum())
    return _decibels(signal, noise)


def _decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))


def _in_range(tensor: Tensor, name: str, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise InputError(
            f"{entry.file}: {name} holds numbers above {torch.finfo(dtype).max:g}, the largest of {str(dtype)[6:]}",
            hint="convert with dtype: bfloat16 (model.dtype in the recipe)",
            where=name,
            kind="out-of-range",
        )
    return stored


# ------------------------------------------------------------------------------------------------- with prompts


def _calibrated(
    plan: EncoderPlan, call: EncoderCall, sink: _Sink, *, device: torch.device, budget: Budget, plain: bool
) -> tuple[float, ...]:
    """Rounds every block for what `call` makes it read. Returns the hidden states' SQNR after each block."""
    call, held = _with_held_out(call.cropped(), budget.tokens)
    weights = call.token_weights()
    weights[: 2 * held] = 0
    counted = call.token_weights()[:held] > 0
    hidden: list[float] = []
    by_block: dict[str, list[EncoderLayer]] = {}
    for layer in plan.layers:
        if layer.block is not None:
            by_block.setdefault(layer.block, []).append(layer)

    def visit(path: str, block: nn.Module, run: Callable[[], Any]) -> Any:
        inputs: dict[str, Tensor] = {}
        layers = {layer.name: block.get_submodule(layer.name[len(path) + 1 :]) for layer in by_block[path]}
        handles = [module.register_forward_pre_hook(_keep(inputs, name)) for name, module in layers.items()]
        exact = run()
        for handle in handles:
            handle.remove()
        for names, rows in _shared(inputs, weights):
            group = [layer for layer in by_block[path] if layer.name in names]
            own = [cast(nn.Linear, layers[layer.name]) for layer in group]
            for layer, linear, solution in zip(
                group, own, _solved(own, rows, budget, plain=plain), strict=True
            ):
                before, after = linear.weight.float(), solution.weight
                sink.take(layer, solution, _output_sqnr(rows, before, after))
                linear.weight.data = after.to(linear.weight.dtype)
        rough = run()
        if held and (pair := _states(exact, rough, held)) is not None:
            first, second = (state[counted.to(state.device)] for state in pair)
            hidden.append(_decibels(float(first.square().sum()), float((first - second).square().sum())))
        return _joined(exact, rough, held, len(call.ids))

    compute = torch.float32 if device.type == "cpu" else plan.dtype
    run_by_block(
        plan.empty_model(),
        plan.blocks,
        own_weights(plan.tensors, plan.parameters, dtype=compute),
        call,
        visit,
        device=device,
    )
    return tuple(round(each, 3) for each in hidden)


def _solved(linears: list[nn.Linear], rows: Tensor, budget: Budget, *, plain: bool) -> list[Nf4Solution]:
    weights = [linear.weight.float() for linear in linears]
    if plain:
        return [nearest(weight, plain=True) for weight in weights]
    fit = _FACTORED * rows.shape[1] ** 2 <= budget.moments
    return solve_for_rows(weights, rows, moments_fit=fit)


def _output_sqnr(rows: Tensor, before: Tensor, after: Tensor) -> float:
    some = evenly(rows, 512)
    exact = some @ before.T
    return _decibels(float(exact.square().sum()), float((some @ (after - before).T).square().sum()))


def _with_held_out(call: EncoderCall, tokens: int) -> tuple[EncoderCall, int]:
    """The call with the held-out prompts first, twice: [16-bit, 4-bit, calibration]. None is held out of few."""
    most = max(1, tokens // call.ids.shape[1])
    every = torch.arange(len(call.ids))
    held = HELD_OUT if len(every) >= 4 * HELD_OUT else 0
    kept = evenly(every[held:].unsqueeze(1), max(1, most - 2 * held)).flatten()
    return call.taking(torch.cat([every[:held], every[:held], kept])), held


def _keep(inputs: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    return hook


def _shared(inputs: Mapping[str, Tensor], weights: Tensor) -> Iterator[tuple[list[str], Tensor]]:
    """Layers that read one tensor, and its rows (M, K) float32, each times the root of how much it counts."""
    by_input: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in inputs.items():
        by_input.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    root = weights.flatten().sqrt()
    chosen = evenly(root.nonzero(), MOST_ROWS).flatten()
    for names in by_input.values():
        tensor = inputs[names[0]]
        flat = tensor.flatten(0, -2)
        if len(flat) == len(root):
            rows = flat[chosen.to(flat.device)].float() * root[chosen].to(flat.device).unsqueeze(1)
        else:
            rows = evenly(flat, MOST_ROWS).float()
        yield names, rows


def _states(exact: Any, rough: Any, held: int) -> tuple[Tensor, Tensor] | None:
    """The held-out prompts' hidden states in both, float32."""
    first, second = (value[0] if isinstance(value, tuple) else value for value in (exact, rough))
    if not isinstance(first, Tensor) or first.ndim != 3:
        return None
    return first[:held].float(), second[held : 2 * held].float()


def _joined(exact: Any, rough: Any, held: int, count: int) -> Any:
    """What the next block gets: of the held-out prompts' first copy `exact`, of all others `rough`."""
    if not held:
        return rough
    firsts = iter(_leaves(exact))

    def pick(value: Any) -> Any:
        first = next(firsts)
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == count:
            return torch.cat([first[:held], value[held:]])
        return value

    return tree_map(pick, rough)


def _leaves(value: Any) -> list[Any]:
    from torch.utils._pytree import tree_leaves

    return tree_leaves(value)
