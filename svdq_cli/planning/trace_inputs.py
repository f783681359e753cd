"""One forward pass of a model without weights, to see what its linear layers read and what becomes of what they give.

The model's weights have no memory and the inputs are made up (`weightless`, `made_arguments`), so that a model of any
size takes seconds. Seen are: which layers read the same tensor, how many tokens an image has there, whether a layer's
input comes from the image, from the text, or only from the timestep and the like, and whether its output does anything
but scale, shift and gate whole channels, or choose experts.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from svdq_cli.planning.class_arguments import CONFIG_CHANGES, OF_CLASS, SPARE_ARGUMENTS
from svdq_cli.planning.made_arguments import WidthMismatch, calls
from svdq_cli.planning.pointwise import channels_last, is_pointwise
from svdq_cli.planning.structure import Reading
from svdq_cli.planning.weightless import Weightless

_MAX_WIDTHS = 12  # corrections of widths in one call


def watch(model: nn.Module) -> dict[str, Reading] | None:
    """What every linear of a meta-device model reads; None where no forward pass could be put together."""
    kind = type(model).__name__
    with _config_changed(model, CONFIG_CHANGES.get(kind, {})):
        for call in calls(model, OF_CLASS.get(kind, {})):
            for _ in range(_MAX_WIDTHS):
                try:
                    return watch_call(model, call.arguments()) or None
                except WidthMismatch as mismatch:
                    if not call.world.correct(mismatch):
                        break
                except Exception:  # any model's own way to refuse wrong shapes; the next call is tried
                    break
    return None


def watch_call(
    model: nn.Module, arguments: Mapping[str, Any], positional: tuple[Any, ...] = ()
) -> dict[str, Reading]:
    """The readings of one call. `model`: weights on the meta device; its small tensors are given values, in place.

    Raises WidthMismatch where a layer reads another number of channels than its weights have, and whatever the model
    raises.
    """
    model.eval()
    flow = Dataflow(model, arguments, positional)
    flow.materialize_small(model)
    handles = [hook for name, module in model.named_modules() for hook in flow.hooks(name, module)]
    try:
        with torch.no_grad(), flow:
            model(*positional, **arguments)
    finally:
        for handle in handles:
            handle.remove()
        flow.forget_compiled()
    return flow.readings()


class Dataflow(Weightless):
    """Follows the inputs of a call, and the outputs of its linear layers, through every operation."""

    def __init__(
        self, model: nn.Module, arguments: Mapping[str, Any], positional: tuple[Any, ...] = ()
    ) -> None:
        super().__init__()
        names = [*inspect.signature(model.forward).parameters]
        given = {**dict(zip(names, positional, strict=False)), **arguments}
        self._latents = next(
            (name for name in names if not _POSITIONS.search(name) and _rows_of(given.get(name)) > 1),
            names[0],
        )
        self._batch = _batch_of(given.get(self._latents))
        self._origins: Any = WeakIdKeyDictionary()  # tensor -> names of the arguments that it comes from
        self._outputs: Any = WeakIdKeyDictionary()  # tensor -> the layers of whose output it is a part
        self._numbers: Any = WeakIdKeyDictionary()  # tensor -> its number, by which inputs are told apart
        self._seen: dict[str, tuple[int, int, frozenset[str]]] = {}
        self._uses: dict[str, set[str]] = {}
        self._rows: dict[str, int] = {}
        self._vectors: set[str] = set()
        for name, value in given.items():
            if not _POSITIONS.search(name):
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        self._origins[leaf] = frozenset([name])
                if _rows_of(value) <= self._batch:
                    self._vectors.add(name)

    def hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Hooks that note what a layer reads and gives, and check the width of what any layer reads."""
        axis, width = _wanted(module)

        def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and x.ndim > 1 and x.shape[axis] != width:
                raise WidthMismatch(x.shape[axis], width)

        if width:
            yield module.register_forward_pre_hook(check, with_kwargs=True)
        if isinstance(module, nn.Linear) or is_pointwise(module):

            def note(
                layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
            ) -> Tensor:
                return self._note(name, layer, args[0] if args else kwargs["input"], output)

            yield module.register_forward_hook(note, with_kwargs=True)

    def _note(self, name: str, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The output that the model goes on with."""
        y = channels_last(x) if isinstance(layer, nn.Conv2d) else x
        origins = self._origins.get(x, frozenset())
        # tokens may happen to be equal, a vector that was repeated for every token is one vector
        rows = y.numel() // y.shape[-1] if origins - self._vectors else _distinct_rows(y)
        if name not in self._seen:
            if x not in self._numbers:
                self._numbers[x] = len(self._seen)
            self._seen[name] = (self._numbers[x], rows, origins)
            self._rows[name] = rows
            self._uses[name] = set()
        if rows == 1 and y is x and output.numel() > output.shape[-1]:
            # a layer without weights gives numbers of a pool, which would make different rows of equal ones
            first = output.reshape(-1, output.shape[-1])[0]
            output = first.expand_as(output).clone()
            self._origins[output] = origins
        self._outputs[output] = frozenset([name])
        return output

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        origins = frozenset().union(*(self._origins.get(x, frozenset()) for x in given))
        if origins:
            changed = [args[0]] if func._schema.is_mutable and isinstance(args[0], Tensor) else []  # pyright: ignore[reportFunctionMemberAccess]
            for x in [*made, *changed, *(x._base for x in changed if x._base is not None)]:
                self._origins[x] = origins | self._origins.get(x, frozenset())
        self._follow(func, given, made)
        return result

    def _follow(self, func: Callable[..., Any], given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """What one operation does with outputs of layers."""
        followed = [(x, layers) for x in given if (layers := self._outputs.get(x))]
        if not followed:
            return
        name = func._schema.name.removeprefix("aten::").rstrip("_")  # pyright: ignore[reportFunctionMemberAccess]
        everyone = frozenset().union(*(layers for _, layers in followed))
        if _CHOOSES.fullmatch(name):
            self._use(everyone, "chooses")
        elif _SAME.fullmatch(name):
            for x in made:
                self._outputs[x] = everyone | self._outputs.get(x, frozenset())
        elif _COMBINES.fullmatch(name):
            wide = max((_rows_as(x, followed[0][0]) for x in given), default=0)
            own = {layer for layer in everyone if self._rows[layer] * 2 <= wide}
            self._use(frozenset(own), "modulates")
            few = frozenset(layer for layer in everyone - own if self._rows[layer] <= _FEW * self._batch)
            self._use(everyone - own - few, "is read")
            for x in made:
                if few:
                    self._outputs[x] = few
        elif not _LOOKS.fullmatch(name):
            self._use(everyone, "is read")

    def _use(self, layers: frozenset[str], use: str) -> None:
        for layer in layers:
            self._uses[layer].add(use)

    def readings(self) -> dict[str, Reading]:
        found: dict[str, Reading] = {}
        for name, (source, rows, origins) in self._seen.items():
            tokens = math.ceil(rows / self._batch)
            uses = self._uses[name]
            of_tokens = bool(origins - self._vectors)
            of_image = self._latents in origins
            # an expert that one token of the image went to reads no conditioning vector
            read_as_vector = not of_image and (tokens == 1 or not of_tokens)
            gives_vector = uses == {"modulates"} and (tokens == 1 or not of_image)
            vector = tokens <= _FEW and (read_as_vector or gives_vector)
            found[name] = Reading(
                source,
                tokens,
                of_image=of_image,
                chooses="chooses" in uses,
                modulates=vector,
                conditions=not vector and bool(origins) and not of_tokens,
                spare=bool(origins) and origins <= SPARE_ARGUMENTS,
            )
        return found


# Arguments that say where tokens are, how many and which count, but nothing of what they are.
_POSITIONS = re.compile(
    r"(img|txt|image|text|position|segment)_ids|rope|rotary|mask|ind(ic|ex)es|shape|coords|sizes?$|lens$"
)
_FEW = 8  # rows of an image that may still be conditioning vectors: one a frame, one a noise level

# Operations whose result is the same values in another form, or a function of each value alone.
_SAME = re.compile(
    "view|_unsafe_view|reshape|_reshape_alias|unsqueeze|squeeze|expand|permute|transpose|t|slice|select|split|"
    "split_with_sizes|unbind|chunk|narrow|clone|_to_copy|alias|detach|contiguous|repeat|repeat_interleave|index|"
    "index_select|gather|cat|stack|where|masked_fill|unflatten|flatten|movedim|silu|gelu|tanh|sigmoid|relu|softplus|"
    "exp|neg|abs|clamp|softmax|_softmax|_log_softmax|native_dropout|copy|lift_fresh|div|pow|sqrt|rsqrt|roll|flip|"
    "as_strided|constant_pad_nd"
)
_COMBINES = re.compile("mul|add|sub|addcmul|addcdiv|rsub|lerp")
_CHOOSES = re.compile("topk|sort|argsort|argmax|max|kthvalue")
# Operations that only ask about a tensor.
_LOOKS = re.compile(
    "is_nonzero|equal|eq|ne|isnan|isinf|all|any|sym_size|zeros_like|ones_like|empty_like|new_zeros"
)


def _rows_as(x: Tensor, like: Tensor) -> int:
    """How many rows of `like`'s channels `x` has; a vector of the last axis's width is one row."""
    channels = like.shape[-1] if like.ndim and like.shape[-1] > 1 else max((s for s in like.shape), default=1)
    return x.numel() // max(1, channels)


def _distinct_rows(x: Tensor) -> int:
    """Rows of a layer's input that differ: a vector that was repeated for every token is one."""
    rows = x.detach().reshape(-1, x.shape[-1]).double()
    weights = torch.linspace(1.0, 2.0, rows.shape[-1], dtype=rows.dtype).sin()
    return int(torch.unique(rows @ weights).numel()) if rows.numel() else 0


def _rows_of(value: Any) -> int:
    """Tokens, or pixels, of an argument; 1 for one vector."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel()]
    return max((_rows_of_tensor(leaf) for leaf in leaves), default=0)


def _rows_of_tensor(x: Tensor) -> int:
    if not x.is_floating_point():
        return x.numel()
    return x.numel() // x.shape[-1] if x.ndim > 1 else 1


def _batch_of(latents: Any) -> int:
    """Images in a call."""
    if isinstance(latents, (list, tuple)):
        return max(1, len(latents))
    return latents.shape[0] if isinstance(latents, Tensor) and latents.ndim > 1 else 1


def _wanted(module: nn.Module) -> tuple[int, int]:
    """Axis and number of the channels that a layer's weights want; (0, 0) where that is not known."""
    match module:
        case nn.Linear():
            return -1, module.in_features
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return 1, module.in_channels
        # not of subclasses, which may turn what they read
        case nn.LayerNorm() | nn.RMSNorm() if type(module) in (nn.LayerNorm, nn.RMSNorm):
            return -1, module.normalized_shape[-1]
        case _:
            weight = getattr(module, "weight", None)
            norm = (
                type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.ndim == 1
            )
            return (-1, weight.shape[0]) if norm and isinstance(weight, Tensor) else (0, 0)


@contextmanager
def _config_changed(model: nn.Module, changes: Mapping[str, Any]) -> Iterator[None]:
    """The model's config with other values, for one pass."""
    config = getattr(model, "_internal_dict", None)
    if not changes or config is None:
        yield
        return
    model._internal_dict = type(config)({**config, **changes})
    try:
        yield
    finally:
        model._internal_dict = config
