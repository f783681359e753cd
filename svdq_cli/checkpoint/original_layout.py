"""Files whose modules are those of a model's original checkpoint: the names that ComfyUI builds its models by.

What `source.original_names` says of reading such a checkpoint is read backwards here: which of diffusers' layers an
original one consists of, and in which order of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from svdq_cli.checkpoint.file_layout import FileLayout, KeptTensor, StoredModule
from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.layouts.layout import STACKED, HalvesSwapped, Marker, RowOrder
from svdq_cli.formats.contract import Format
from svdq_cli.records import LayerPlan, Linear, RotatedPlan, W4A4Plan, W4A16Plan
from svdq_cli.source.names import Naming, Part, original_layers, renamed, split_key
from svdq_cli.source.original_names import CHROMA, FLUX1, FLUX2, LDM_UNET, PIXART, SD3, WAN, Z_IMAGE

# ComfyUI took Qwen-Image's modules as diffusers has them.
QWEN_IMAGE = Naming(
    name="diffusers' names",
    model_class="QwenImageTransformer2DModel",
    signature=frozenset(),
    rules=lambda keys: tuple(renamed(layer, layer) for layer in dict.fromkeys(map(_layer_of, keys))),
    suffixes={},
)
_MARKERS = {QWEN_IMAGE.model_class: (Marker("__index_timestep_zero__", "zero_cond_t"),)}  # of Edit 2511


@dataclass(frozen=True, slots=True)
class OriginalLayout:
    """How the models of one class are stored: under their original names, each matrix that was fused stacked again."""

    naming: Naming
    markers: tuple[Marker, ...] = ()


ORIGINAL_LAYOUTS = tuple(
    OriginalLayout(naming, _MARKERS.get(naming.model_class, ()))
    for naming in (FLUX1, FLUX2, CHROMA, QWEN_IMAGE, Z_IMAGE, WAN, SD3, LDM_UNET, PIXART)
)


def original_layout_of(model_class: str, format_name: str) -> OriginalLayout:
    """The layout of a model class. Raises UsageError that names what there is."""
    for layout in ORIGINAL_LAYOUTS:
        if layout.naming.model_class == model_class:
            return layout
    known = ", ".join(layout.naming.model_class for layout in ORIGINAL_LAYOUTS)
    raise UsageError(
        f"the format {format_name} has no layout for the model class {model_class}",
        hint=f"{format_name} supports {known}; nunchaku-lite supports every family",
        where=model_class,
        kind="unsupported-format",
    )


def lay_out_original(
    fmt: Format,
    layout: OriginalLayout,
    layers: tuple[LayerPlan, ...],
    state: Mapping[str, tuple[int, ...]],
) -> FileLayout:
    """The file of a plan, as `match_layout.lay_out`. A module is quantized where all of its layers are, in one way;
    it stays at 16 bits otherwise."""
    planned = {layer.name: layer for layer in layers}
    modules: list[StoredModule] = []
    kept: dict[str, KeptTensor] = {}
    for original, parts in _original(layout, state):
        names = tuple(part.target for part in parts)
        order: RowOrder = HalvesSwapped() if len(parts[0].rows) > 1 else STACKED
        module = _module(fmt, original, [planned.get(name) for name in names], order)
        if module is not None:
            modules.append(module)
        else:
            kept |= _kept(layout.naming, original, names, state, order)
    quantized = {layer.name for module in modules for layer in module.layers}
    spoken = {name for tensor in kept.values() for name in tensor.sources}
    if rest := [name for name in state if name not in spoken and _layer_of(name) not in quantized]:
        raise UsageError(
            f"{fmt.name} has no name for {len(rest)} tensors of this model; the first is {rest[0]}",
            hint="the model is a variant that ComfyUI does not know; use nunchaku-lite",
            where=rest[0],
        )
    return FileLayout(tuple(modules), kept)


def layers_in_original(
    layout: OriginalLayout,
    stored: tuple[LayerPlan, ...],
    linears: Mapping[str, Linear],
    state: Mapping[str, tuple[int, ...]],
) -> tuple[LayerPlan, ...]:
    """The model's layers behind the stored modules of a file, in the order of `linears`: the inverse of
    `lay_out_original`. InputError for a module that the model does not have."""
    modules = {plan.name: plan for plan in stored}
    found: dict[str, LayerPlan] = {}
    for original, parts in _original(layout, state):
        plan = modules.pop(original, None)
        if plan is None:
            continue
        for part in parts:
            if part.target not in linears:
                raise InputError(f"{original}: the model has no layer {part.target}", where=original)
            found[part.target] = replace(plan, linear=linears[part.target])
    if modules:
        name = next(iter(modules))
        raise InputError(
            f"{name}: no module of this model has that name in this format",
            hint="the file or its config belongs to a different model",
            where=name,
        )
    return tuple(found[name] for name in linears if name in found)


def _original(
    layout: OriginalLayout, state: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """The original layers of a model and what they consist of, in the order of the model's tensors."""
    layers = tuple(dict.fromkeys(map(_layer_of, state)))
    places = {layer: place for place, layer in enumerate(layers)}
    found: dict[str, tuple[Part, ...]] = {}
    spoken: set[str] = set()
    for original, parts in original_layers(layout.naming, layers).items():
        targets = {part.target for part in parts}
        if spoken.isdisjoint(targets):  # a rule for all layers of a block comes after those for single ones
            found[original] = parts
            spoken |= targets
    yield from sorted(found.items(), key=lambda item: min(places[part.target] for part in item[1]))


def _layer_of(tensor: str) -> str:
    return split_key(tensor)[0]


def _module(
    fmt: Format, original: str, plans: list[LayerPlan | None], order: RowOrder
) -> StoredModule | None:
    """The stored module of an original layer; None where it stays at 16 bits."""
    members = tuple(plan for plan in plans if plan is not None)
    first = members[0] if members else None
    if first is None or len(members) < len(plans):
        return None
    if len(members) > 1 and not all(isinstance(plan, RotatedPlan | W4A4Plan) for plan in members):
        return None
    if len({_kind(plan) for plan in members}) > 1:
        return None
    linears = [plan.linear for plan in members]
    linear = Linear(
        original, linears[0].in_features, sum(each.out_features for each in linears), linears[0].bias
    )
    plan = replace(first, linear=linear)
    if len({each.bias for each in linears}) > 1 or fmt.unsupported_reason(plan) is not None:
        return None
    return StoredModule(plan, (members,), order=order)


def _kind(plan: LayerPlan) -> object:
    """What layers that are stored as one matrix have in common."""
    match plan:
        case RotatedPlan():
            return type(plan), plan.activation_bits, plan.rotation
        case W4A4Plan():
            return type(plan), plan.precision, plan.rank
        case W4A16Plan():
            return type(plan)


def _kept(
    naming: Naming,
    original: str,
    names: tuple[str, ...],
    state: Mapping[str, tuple[int, ...]],
    order: RowOrder,
) -> dict[str, KeptTensor]:
    """The 16-bit tensors of an original layer, those of its parts under one another."""
    found: dict[str, KeptTensor] = {}
    for suffix in ("", ".weight", ".bias"):
        sources = tuple(name + suffix for name in names)
        present = [name for name in sources if name in state]
        if present and len(present) < len(sources):
            raise UsageError(f"{present[0]}: only some of the layers of {original} have a {suffix[1:]}")
        if present:
            found[original + _stored_suffix(naming, original, suffix)] = KeptTensor(sources, order)
    return found


def _stored_suffix(naming: Naming, original: str, suffix: str) -> str:
    """`.scale` for the weight of a norm where the original has it so."""
    spelled = {f".{ours}": f".{theirs}" for theirs, ours in naming.suffixes.items()}
    return spelled.get(suffix, suffix) if "norm" in original else suffix
