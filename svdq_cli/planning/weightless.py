"""Run a model whose weights have no memory on inputs that have values.

On torch's meta device alone no value can be read, and many models read some: how long a text is, where the image's
tokens are, which expert a token goes to. Here the inputs are ordinary CPU tensors with values, only the weights are
on the meta device. What a large weight would compute is replaced by numbers from a fixed pool in the right shape;
everything else (norms, attention, indices, masks) is computed. A model of any size runs in seconds, and no weight is
read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

# Elements of a tensor without memory that is given values (zeros) where an operation needs it: norms, biases, tables of
# positions. Larger ones only lend their shape.
_SMALL = 1 << 16
_POOL = 1 << 20

_META = torch.device("meta")
_CPU = torch.device("cpu")


class Weightless(TorchDispatchMode):
    """While it is active, operations on CPU tensors and weights on the meta device give CPU tensors."""

    def __init__(self) -> None:
        super().__init__()
        if type(self) not in flex_attention.python_key_table:
            flex_attention.py_impl(type(self))(_flex_attention)
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(_POOL, generator=generator, dtype=torch.float32)
        self._offset = 0
        self.compiled = False  # whether attention under a mask that is a program was compiled for this mode

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        # what is made "where the weights are" is made on the CPU
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            kwargs["device"] = _CPU
        flat, spec = tree_flatten((args, kwargs))
        empty = [v for v in flat if isinstance(v, Tensor) and v.device.type == "meta"]
        if not empty:
            return func(*args, **kwargs)
        wants_values = kwargs.get("device") is not None or func in _READS_VALUES
        if len(empty) == sum(isinstance(v, Tensor) for v in flat) and not wants_values:
            return func(*args, **kwargs)
        if wants_values or all(v.numel() <= _SMALL for v in empty):
            given_args, given_kwargs = _with(flat, spec, self._filled)
            return func(*given_args, **given_kwargs)
        if func._schema.is_mutable:  # pyright: ignore[reportFunctionMemberAccess]
            return args[0]
        meta_args, meta_kwargs = _with(flat, spec, _to_meta)
        return tree_map(self._filled, func(*meta_args, **meta_kwargs))

    def forget_compiled(self) -> None:
        """Have torch compile attention anew outside of this mode: what it has compiled inside runs nowhere else."""
        if self.compiled:
            torch._dynamo.reset()

    def materialize_small(self, model: nn.Module) -> None:
        """Give values to a meta model's small parameters and buffers, in place: norms, biases, tables."""
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.device.type == "meta" and tensor.numel() <= _SMALL:
                        value = self._filled(tensor)
                        parameter = isinstance(tensor, nn.Parameter)
                        tensors[name] = nn.Parameter(value, requires_grad=False) if parameter else value

    def _filled(self, value: Any) -> Any:
        """A CPU tensor like the one on the meta device."""
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return value
        if not value.dtype.is_floating_point:
            return torch.zeros(value.shape, dtype=value.dtype)
        return self.numbers(*value.shape).to(value.dtype)

    def numbers(self, *shape: int) -> Tensor:
        """A tensor of numbers about as large as a standard normal's, other ones every time. Of any shape."""
        count = math.prod(shape)
        self._offset = (self._offset + 7919) % (_POOL // 2)
        pool = self._pool[self._offset :]
        if count > pool.numel():
            pool = pool.repeat(math.ceil(count / pool.numel()))
        return pool[:count].reshape(shape).clone()


_READS_VALUES = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
}


def _with(flat: list[Any], spec: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_unflatten([change(v) if isinstance(v, Tensor) else v for v in flat], spec)


def _to_meta(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)


def _flex_attention(
    mode: Weightless, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any
) -> Any:
    """Attention under a mask that is a program, in the right shape: (output, log-sum-exp, largest scores)."""
    mode.compiled = True
    shape = query.shape[:-1]
    output = mode.numbers(*shape, value.shape[-1]).to(query.dtype)
    return output, torch.zeros(shape, dtype=torch.float32), torch.zeros(shape, dtype=torch.float32)
