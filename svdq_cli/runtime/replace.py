"""Put converted linears in the place of a model's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from torch import Tensor, nn

from svdq_cli.errors import InputError
from svdq_cli.planning.pointwise import channels_first, channels_last, is_pointwise
from svdq_cli.runtime.kernel_linear import KernelW4A4Linear, fused_feed_forward


class PointwiseConvolution(nn.Module):
    """A converted linear in the place of a 1x1 convolution: (B, C, H, W) in and out."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, input: Tensor) -> Tensor:
        return channels_first(self.linear(channels_last(input)))


def replace_linears(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Set `model`'s submodules by dotted path ("blocks.0.ff.net.2"). All are checked before the first is set.

    Raises InputError, naming the layer, for a path the model does not have and for another shape.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        _check(name, layer, modules)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        pointwise = is_pointwise(modules[name])
        setattr(modules[parent], leaf, PointwiseConvolution(layer) if pointwise else layer)


def fuse_feed_forwards(model: nn.Module) -> int:
    """Put one fused module in the place of every linear - GELU - linear whose linears run on the kernels.

    Known by its parts, as diffusers' FeedForward has them: `net` = a GELU by tanh with its `proj`, a dropout (which
    does nothing at inference), and a linear. And as diffusers' single blocks have them, all of which run
    `proj_out(cat(attn(x), act_mlp(proj_mlp(x))))`. Returns how many were found.
    """
    found = {name: fused for name, module in model.named_modules() if (fused := _fused_feed_forward(module))}
    for name, fused in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, fused)
    beside = [(module, fused) for module in model.modules() if (fused := _fused_beside_attention(module))]
    for block, fused in beside:
        block.proj_mlp, block.act_mlp, block.proj_out = nn.Identity(), nn.Identity(), fused
    return len(found) + len(beside)


def share_quantizers(model: nn.Module) -> int:
    """Let layers on the kernels that read one activation quantize it once. Returns for how many activations.

    Known by their parts: layers of one module (q, k and v of an attention) whose smoothing factors and down projections
    are the same, as a conversion gives to layers of one input. At rank 0 nothing tells them from others.
    """
    groups = [
        group for module in model.modules() for group in _readers_of_one_input(module) if len(group) > 1
    ]
    for group in groups:
        shared = group[0].quantizer.for_readers(len(group))
        for reader, layer in enumerate(group):
            layer.read_through(shared, reader=reader)
    return len(groups)


def _readers_of_one_input(module: nn.Module) -> list[list[KernelW4A4Linear]]:
    groups: list[list[KernelW4A4Linear]] = []
    for layer in module.children():
        if not isinstance(layer, KernelW4A4Linear) or layer.plan.rank == 0:
            continue
        same = next((group for group in groups if group[0].quantizer.equals(layer.quantizer)), None)
        if same is None:
            groups.append([layer])
        else:
            same.append(layer)
    return groups


def _fused_feed_forward(module: nn.Module) -> nn.Module | None:
    net = getattr(module, "net", None)
    if not isinstance(net, nn.ModuleList) or len(net) != 3 or getattr(net[0], "approximate", None) != "tanh":
        return None
    first, second = getattr(net[0], "proj", None), net[2]
    if first is None:
        return None
    return fused_feed_forward(first, second)


def _fused_beside_attention(block: nn.Module) -> nn.Module | None:
    first, between, last = (getattr(block, name, None) for name in ("proj_mlp", "act_mlp", "proj_out"))
    if not (isinstance(first, KernelW4A4Linear) and isinstance(last, KernelW4A4Linear)):
        return None
    by_tanh = isinstance(between, nn.GELU) and between.approximate == "tanh"
    return first.beside_attention(last) if by_tanh and hasattr(block, "attn") else None


def _check(name: str, layer: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    if not name or name not in modules:
        nearest = difflib.get_close_matches(name, modules, n=1)
        raise InputError(
            f"the model has no layer {name!r}",
            hint=f"the nearest name is {nearest[0]!r}; was this checkpoint made from a different model?"
            if nearest
            else "was this checkpoint made from a different model?",
            where=name,
            kind="unknown-layer",
        )
    has, wants = _features(modules[name]), _features(layer)
    if has is None:
        found = type(modules[name]).__name__
        raise InputError(f"{name} is a {found}, not a linear layer", where=name, kind="not-a-linear")
    if has != wants:
        raise InputError(
            f"{name} maps {has[0]} to {has[1]} features, the checkpoint's layer maps "
            + (f"{wants[0]} to {wants[1]}" if wants else "an unknown number"),
            hint="the checkpoint belongs to a different size of this model",
            where=name,
            kind="shape-mismatch",
        )


def _features(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Conv2d) and is_pointwise(module):
        return module.in_channels, module.out_channels
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return found if isinstance(found[0], int) and isinstance(found[1], int) else None  # type: ignore[return-value]
