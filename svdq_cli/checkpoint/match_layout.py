"""A family's layout meets a plan: which modules a file holds, and which layers of the model each of them holds.

All of it is known before a number is: `checkpoint.assembly` moves the numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from svdq_cli.checkpoint.file_layout import (
    FileLayout,
    KeptTensor,
    StoredModule,
    joined_files,
    padded,
    with_prefix,
)
from svdq_cli.checkpoint.original_layout import (
    OriginalLayout,
    lay_out_original,
    layers_in_original,
    original_layout_of,
)
from svdq_cli.errors import InputError, UsageError
from svdq_cli.families.layouts import layout_of
from svdq_cli.families.layouts.layout import (
    BlockLayout,
    KeptRule,
    ModelLayout,
    ModuleRule,
)
from svdq_cli.formats.contract import Format, LayoutTraits
from svdq_cli.planning.joint import with_name
from svdq_cli.records import Int4, LayerPlan, Linear, ModelPlan, RotatedPlan, W4A4Plan, W4A16Plan
from svdq_cli.source import by_component, prefix_of, stacks_of

Layout = ModelLayout | OriginalLayout | None  # None: diffusers' own modules


def marker_names(layout: Layout, config: Mapping[str, object]) -> tuple[str, ...]:
    """The empty tensors by which a file's runtime tells what the model's config says."""
    markers = layout.markers if layout else ()
    return tuple(marker.name for marker in markers if config.get(marker.value) is True)


def known_layout(fmt: Format, family: str, model_class: str) -> Layout:
    """A model's layout in a format, None where the format keeps diffusers' modules. UsageError without one."""
    if fmt.original_names:
        return original_layout_of(model_class, fmt.name)
    return None if fmt.own_names else layout_of(family, fmt.name)


def lay_out(
    fmt: Format,
    layout: Layout,
    layers: tuple[LayerPlan, ...],
    state: Mapping[str, tuple[int, ...]],
) -> FileLayout:
    """The file of a plan. `state`: the model's tensors, name to shape.

    Raises UsageError for what the format has no place for; a format that mixes keeps such layers at 16 bits instead.
    """
    if isinstance(layout, OriginalLayout):
        return lay_out_original(fmt, layout, layers, state)
    planned = {layer.name: layer for layer in layers}
    if layout is None:
        own = tuple(
            StoredModule(layer, ((layer,),)) for layer in layers if fmt.unsupported_reason(layer) is None
        )
        names = {module.name for module in own}
        return FileLayout(own, _kept_as_they_are([n for n in state if _module_of(n) not in names], state))
    modules: list[StoredModule] = []
    kept: dict[str, KeptTensor] = {}
    for block, stored_prefix, prefix in _blocks(layout, state):
        for rule in block.modules:
            module = _module(fmt, layout, rule, stored_prefix, prefix, planned, state)
            if module is not None:
                modules.append(module)
            else:
                kept |= _kept_module(rule, stored_prefix, prefix, state)
        kept |= _kept_rules(block.kept, f"{stored_prefix}.", f"{prefix}.", state)
    kept |= _kept_rules(layout.kept, "", "", state)
    quantized = {layer.name for module in modules for layer in module.layers}
    spoken = {name for tensor in kept.values() for name in tensor.sources}
    rest = [name for name in state if name not in spoken and _module_of(name) not in quantized]
    if rest and layout.names_all:
        raise UsageError(
            f"{fmt.name} has no name for {len(rest)} tensors of this model; the first is {rest[0]}",
            hint="the model is a variant that this format's runtime does not support; use nunchaku-lite",
            where=rest[0],
        )
    kept |= {name: KeptTensor((name,)) for name in rest}
    return FileLayout(tuple(modules), {n: t for n, t in kept.items() if _at_16_bits(t, quantized)})


def _kept_as_they_are(names: Sequence[str], state: Mapping[str, tuple[int, ...]]) -> dict[str, KeptTensor]:
    """16-bit tensors under their own names. Experts of which none is in 4 bits are stacked, as diffusers has them."""
    kept = stacks_of(names)
    whole = {stack: weights for stack, weights in stacks_of(state).items() if kept.get(stack) == weights}
    stacked = {weight for weights in whole.values() for weight in weights}
    found = {name: KeptTensor((name,)) for name in names if name not in stacked}
    return found | {stack: KeptTensor(weights, experts=True) for stack, weights in whole.items()}


def lay_out_denoisers(
    fmt: Format, layout: Layout, plan: ModelPlan, state: Mapping[str, tuple[int, ...]]
) -> FileLayout:
    """`lay_out` of every denoiser of a plan, all under their joint names. `state`: the tensors of all of them."""
    layers = by_component(plan.components, plan.by_name)
    tensors = by_component(plan.components, state)
    files: list[FileLayout] = []
    for component in plan.components:
        own = tuple(with_name(layer, name) for name, layer in layers[component].items())
        file = lay_out(fmt, layout, own, tensors[component])
        files.append(with_prefix(file, prefix_of(plan.components, component)))
    return joined_files(files)


def layers_in_file(
    layout: Layout,
    stored: tuple[LayerPlan, ...],
    linears: Mapping[str, Linear],
    state: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
) -> tuple[LayerPlan, ...]:
    """The model's layers behind the stored modules of a file, in the order of `linears`: the inverse of `lay_out`.

    `ranks`: those of single layers, where the file says them. InputError for a module that no rule speaks of.
    """
    if layout is None:
        return stored
    if isinstance(layout, OriginalLayout):
        return layers_in_original(layout, stored, linears, state)
    modules = {plan.name: plan for plan in stored}
    found: dict[str, LayerPlan] = {}
    for block, stored_prefix, prefix in _blocks(layout, state):
        for rule in block.modules:
            plan = modules.pop(f"{stored_prefix}.{rule.stored}", None)
            if plan is None:
                continue
            for layer in rule.layers:
                name = f"{prefix}.{layer}"
                if name not in linears:
                    raise InputError(f"{plan.name}: the model has no layer {name}", where=plan.name)
                found[name] = _source_plan(linears[name], plan, rule, ranks, found.get(name))
    if modules:
        name = next(iter(modules))
        raise InputError(
            f"{name}: no module of this model has that name in this format",
            hint="the file or its config belongs to a different model",
            where=name,
        )
    return tuple(found[name] for name in linears if name in found)


def _source_plan(
    linear: Linear, stored: LayerPlan, rule: ModuleRule, ranks: Mapping[str, int], other: LayerPlan | None
) -> LayerPlan:
    """The plan of one layer in a stored module; `other` is what an earlier part of its columns said."""
    if isinstance(stored, W4A16Plan):
        return W4A16Plan(linear)
    if isinstance(stored, RotatedPlan):
        raise InputError(f"{stored.name}: no format with these names has rotated modules", where=stored.name)
    # Parts that others solved apart have branches of their own; together they are one of all their ranks.
    rank = stored.rank // len(rule.branches) + (other.rank if isinstance(other, W4A4Plan) else 0)
    return W4A4Plan(linear, stored.precision, ranks.get(linear.name, rank))


# ---------------------------------------------------------------------------------------------------- rules


def _blocks(
    layout: ModelLayout, state: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[BlockLayout, str, str]]:
    """Every block with its prefix in the file and in the model."""
    for block in layout.blocks:
        start = tuple(block.stack.split("."))
        for prefix in dict.fromkeys(_block_prefix(name, start) for name in state):
            if prefix is not None:
                yield block, _stored_prefix(block, prefix), prefix


def _block_prefix(name: str, stack: tuple[str, ...]) -> str | None:
    """ "transformer_blocks.3" for a tensor of that block, where `stack` is its list; "*" matches any one name."""
    parts = name.split(".")
    depth = len(stack)
    if len(parts) <= depth or not parts[depth].isdigit():
        return None
    if any(wanted not in ("*", part) for wanted, part in zip(stack, parts, strict=False)):
        return None
    return ".".join(parts[: depth + 1])


def _stored_prefix(block: BlockLayout, prefix: str) -> str:
    return prefix if block.stored == block.stack else f"{block.stored}.{prefix.rsplit('.', 1)[1]}"


def _module(
    fmt: Format,
    layout: ModelLayout,
    rule: ModuleRule,
    stored_prefix: str,
    prefix: str,
    planned: Mapping[str, LayerPlan],
    state: Mapping[str, tuple[int, ...]],
) -> StoredModule | None:
    """The stored module of a rule in one block; None where it stays at 16 bits."""
    names = tuple(tuple(f"{prefix}.{layer}" for layer in branch) for branch in rule.branches)
    flat = [name for branch in names for name in branch]
    if not any(f"{name}.weight" in state for name in flat):
        return None
    stored = f"{stored_prefix}.{rule.stored}"
    missing = [name for name in flat if name not in planned]
    if missing:
        if not fmt.mixes:
            raise UsageError(
                f"{fmt.name} stores {stored} in 4 bits, but {missing[0]} stays at 16",
                hint="quantize it, or choose a format that mixes, such as nunchaku-lite",
                where=missing[0],
            )
        return None
    branches = tuple(tuple(planned[name] for name in branch) for branch in names)
    columns, last = _columns(rule, prefix, state)
    module = _sized(fmt, layout, rule, stored, branches, columns, last)
    if reason := fmt.unsupported_reason(module.plan):
        if fmt.mixes:
            return None
        raise UsageError(
            f"{fmt.name} can't hold {stored} ({', '.join(flat)}): {reason}",
            hint="choose a format that mixes 4-bit and 16-bit layers, such as nunchaku-lite",
            where=flat[0],
        )
    return module


def _columns(
    rule: ModuleRule, prefix: str, state: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, int] | None, bool]:
    """The columns a rule takes, and whether they are the layer's last."""
    if rule.columns is None:
        return None, True
    widths = [state[f"{prefix}.{layer}.weight"][0] for layer in rule.columns.fed_by]
    start = sum(widths[: rule.columns.index])
    return (start, start + widths[rule.columns.index]), rule.columns.index == len(widths) - 1


def _sized(
    fmt: Format,
    layout: ModelLayout,
    rule: ModuleRule,
    stored: str,
    branches: tuple[tuple[LayerPlan, ...], ...],
    columns: tuple[int, int] | None,
    last: bool,
) -> StoredModule:
    """The module with its plan: stacked rows, joined ranks, padded sizes, and whether it has a bias."""
    layers = tuple(layer for branch in branches for layer in branch)
    first = layers[0]
    unsigned = (
        isinstance(first, W4A4Plan)
        and isinstance(first.precision, Int4)
        and rule.after_gelu
        and fmt.unsigned_after_gelu
    )
    quantized_activation = isinstance(first, W4A4Plan)
    traits = LayoutTraits(
        row_scales=layout.row_scales or len(layers) > 1,
        unsigned=unsigned,
        engine_names=layout.dialect == "engine",
    )
    pads = layout.pads and quantized_activation
    rows = [padded(p.linear.out_features) if pads else p.linear.out_features for p in layers]
    width = first.linear.in_features if columns is None else columns[1] - columns[0]
    own_bias = last and any(layer.linear.bias for layer in layers)
    bias = own_bias or unsigned or bool(rule.one_plus) or (layout.always_bias and quantized_activation)
    linear = Linear(stored, padded(width) if pads else width, sum(rows), bias)
    one_plus = rule.one_plus if isinstance(first, W4A16Plan) else ()
    return StoredModule(
        plan=_stored_plan(linear, branches),
        branches=branches,
        order=rule.order,
        columns=columns,
        carries_bias=last,
        one_plus=one_plus,
        pads=pads,
        traits=traits,
    )


def _stored_plan(linear: Linear, branches: tuple[tuple[LayerPlan, ...], ...]) -> LayerPlan:
    """Branches with down projections of their own are stored as one of all their ranks."""
    ranks: list[int] = []
    first = branches[0][0]
    if not isinstance(first, W4A4Plan):
        return replace(first, linear=linear)
    for branch in branches:
        for layer in branch:
            if not isinstance(layer, W4A4Plan) or layer.precision != first.precision:
                raise UsageError(
                    f"{layer.name} and {first.name} are one module in this format and need one precision",
                    where=layer.name,
                )
            if isinstance(branch[0], W4A4Plan) and layer.rank != branch[0].rank:
                raise UsageError(
                    f"{layer.name} and {branch[0].name} share one down projection and need one rank",
                    where=layer.name,
                )
        ranks.append(branch[0].rank if isinstance(branch[0], W4A4Plan) else 0)
    return W4A4Plan(linear, first.precision, sum(ranks))


def _kept_module(
    rule: ModuleRule, stored_prefix: str, prefix: str, state: Mapping[str, tuple[int, ...]]
) -> dict[str, KeptTensor]:
    """A module that stays at 16 bits, weights and biases stacked as its codes would be."""
    found: dict[str, KeptTensor] = {}
    for kind in ("weight", "bias"):
        sources = tuple(f"{prefix}.{layer}.{kind}" for layer in rule.layers)
        present = [name for name in sources if name in state]
        if present and len(present) < len(sources):
            raise UsageError(f"{present[0]}: only some of the layers of {rule.stored} have a {kind}")
        if present:
            found[f"{stored_prefix}.{rule.stored}.{kind}"] = KeptTensor(sources, rule.order)
    return found


def _kept_rules(
    rules: tuple[KeptRule, ...], stored_prefix: str, prefix: str, state: Mapping[str, tuple[int, ...]]
) -> dict[str, KeptTensor]:
    """Renamed tensors. A model without them (no guidance, no bias) has no use for the rule."""
    found: dict[str, KeptTensor] = {}
    for rule in rules:
        sources = tuple(prefix + name for name in rule.sources)
        if all(name in state for name in sources):
            found[stored_prefix + rule.stored] = KeptTensor(sources, rule.order, rule.channels_last)
    return found


def _at_16_bits(tensor: KeptTensor, quantized: set[str]) -> bool:
    return not any(_module_of(name) in quantized for name in tensor.sources)


def _module_of(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".bias")
