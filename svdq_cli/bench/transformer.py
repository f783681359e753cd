"""A transformer with the blocks of FLUX.1 and random weights: what a whole step costs, without a checkpoint.

The linear layers are those of the published model: q, k and v are one layer, in single blocks with the MLP's first one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QKV_ROWS = 2048  # of a double block's image that are written next to the prompt's at a time
ATTENTION_ROWS = 256  # on a CPU: whose scores are in memory at a time
Role = Literal["w4a4", "w4a16"]
MakeLinear = Callable[[int, int, Role], nn.Module]  # in features, out features, role
MakeFeedForward = Callable[[int, int], nn.Module]  # width, inner width: linear, GELU by tanh, linear
Attend = Callable[[Tensor], Tensor]  # q, k and v of some heads (M, 3 widths) -> (M, width)
# width, inner width: a single block's layers, called as `Published` is
MakeSingle = Callable[[int, int], nn.Module]


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """Sizes of the transformer and of one step's input, one image."""

    name: str
    width: int
    heads: int
    inner: int  # of the MLP
    double: int
    single: int
    image_tokens: int
    text_tokens: int

    @property
    def operations(self) -> int:
        """Operations of the linear layers and attentions of one step; a multiplication and addition count as two."""
        tokens = self.image_tokens + self.text_tokens
        linear = 2 * tokens * self.width * (4 * self.width + 2 * self.inner)
        attention = 4 * tokens**2 * self.width
        return (self.double + self.single) * (linear + attention)


FLUX1_DEV_STEP = TransformerShape("flux1-dev at 1024 x 1024", 3072, 24, 12288, 19, 38, 4096, 512)
# What a CPU measures in a minute: one block of either kind, at full width
FLUX1_DEV_BLOCKS = TransformerShape(
    "flux1-dev at 1024 x 1024, one block of either kind", 3072, 24, 12288, 1, 1, 4096, 512
)


class FluxShapedTransformer(nn.Module):
    """All blocks; no embedders and no output layer (0.6 % of the parameters)."""

    def __init__(
        self,
        shape: TransformerShape,
        linear: MakeLinear,
        feed_forward: MakeFeedForward,
        single: MakeSingle | None = None,
    ) -> None:
        """`single`: how a single block's layers are run; as published, without one."""
        super().__init__()
        self.double_blocks = nn.ModuleList(
            DoubleBlock(shape, linear, feed_forward) for _ in range(shape.double)
        )
        make = single or (lambda width, inner: Published(width, inner, linear))
        self.single_blocks = nn.ModuleList(SingleBlock(shape, linear, make) for _ in range(shape.single))

    def forward(self, image: Tensor, text: Tensor, condition: Tensor, angles: Tensor) -> Tensor:
        """(M, width), (T, width), (1, width), rotary angles (T + M, head / 2) -> (M, width)."""
        for block in self.double_blocks:
            image, text = block(image, text, condition, angles)
        words, both = text.shape[0], torch.cat((text, image))
        del text, image
        for block in self.single_blocks:
            both = block(both, condition, angles)
        return both[words:]


class Stream(nn.Module):
    """One side of a double block: its own layers for the image's or the prompt's tokens."""

    def __init__(self, shape: TransformerShape, linear: MakeLinear, feed_forward: MakeFeedForward) -> None:
        super().__init__()
        width = shape.width
        self.modulation = linear(width, 6 * width, "w4a16")
        self.qkv = linear(width, 3 * width, "w4a4")
        self.out = linear(width, width, "w4a4")
        self.feed_forward = feed_forward(width, shape.inner)


class DoubleBlock(nn.Module):
    def __init__(self, shape: TransformerShape, linear: MakeLinear, feed_forward: MakeFeedForward) -> None:
        super().__init__()
        self.head_size = shape.width // shape.heads
        self.text = Stream(shape, linear, feed_forward)
        self.image = Stream(shape, linear, feed_forward)

    def forward(
        self, image: Tensor, text: Tensor, condition: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (M, K) and text tokens (T, K) -> the same shapes."""
        streams = ((self.text, text), (self.image, image))
        parts = [stream.modulation(F.silu(condition)).chunk(6, dim=-1) for stream, _ in streams]
        qkv = image.new_empty(text.shape[0] + image.shape[0], 3 * image.shape[1])
        places = qkv.split([text.shape[0], image.shape[0]])
        for (stream, x), part, place in zip(streams, parts, places, strict=True):
            for rows, target in zip(x.split(QKV_ROWS), place.split(QKV_ROWS), strict=True):
                target.copy_(stream.qkv(modulated(rows, *part[:2])))
        mixed = attention(qkv, angles, self.head_size)
        del qkv, places, place, target
        shares = mixed.split([text.shape[0], image.shape[0]])
        del mixed
        text, image = (
            x + part[2] * stream.out(share)
            for (stream, x), share, part in zip(streams, shares, parts, strict=True)
        )
        del shares, streams, x
        text, image = (
            x + part[5] * stream.feed_forward(modulated(x, *part[3:5]))
            for stream, x, part in zip((self.text, self.image), (text, image), parts, strict=True)
        )
        return image, text


class SingleBlock(nn.Module):
    def __init__(self, shape: TransformerShape, linear: MakeLinear, single: MakeSingle) -> None:
        super().__init__()
        self.head_size = shape.width // shape.heads
        self.modulation = linear(shape.width, 3 * shape.width, "w4a16")
        self.layers = single(shape.width, shape.inner)

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor) -> Tensor:
        """Tokens (M, K) -> (M, K)."""
        scale, offset, gate = self.modulation(F.silu(condition)).chunk(3, dim=-1)
        found = self.layers(
            lambda: modulated(x, scale, offset), lambda qkv: attention(qkv, angles, self.head_size)
        )
        return x + gate * found


class Published(nn.Module):
    """A single block's two layers as the model has them: q, k, v and the MLP's first layer are one."""

    def __init__(self, width: int, inner: int, linear: MakeLinear) -> None:
        super().__init__()
        self.sizes = [3 * width, inner]
        self.first = linear(width, sum(self.sizes), "w4a4")
        self.second = linear(width + inner, width, "w4a4")

    def forward(self, read: Callable[[], Tensor], attend: Attend) -> Tensor:
        """(M, K) tokens of the stream -> (M, K)."""
        qkv, inner = self.first(read()).split(self.sizes, dim=-1)
        mixed = attend(qkv)
        del qkv  # which holds the whole of the first layer's result
        inner = F.gelu(inner, approximate="tanh")
        both = torch.cat((mixed, inner), -1)
        del mixed, inner
        return self.second(both)


def modulated(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """LayerNorm of `x` (..., K), times 1 + `scale`, plus `offset`, both (K,) or (..., K)."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + offset


def attention(qkv: Tensor, angles: Tensor, head_size: int) -> Tensor:
    """(M, 3 width) -> (M, width), with RMS norms and rotary embedding of q and k."""
    if qkv.device.type == "cpu":
        return attention_by_rows(qkv, angles, head_size)
    q, k, v = qkv.unflatten(-1, (3, -1, head_size)).permute(1, 2, 0, 3)
    q, k = (rotated(F.rms_norm(part, part.shape[-1:]), angles) for part in (q, k))
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(-2)


def attention_by_rows(qkv: Tensor, angles: Tensor, head_size: int) -> Tensor:
    """Attention, one head and some rows of q at a time. On a CPU torch's fused attention takes 2.4 times as long as its
    matrix products do (seen with torch 2.13, AVX512-BF16), and would hide what is measured here. `qkv` holds q, k and
    v of all heads, (M, 3 heads head_size); returns (M, heads head_size)."""
    parts = qkv.unflatten(-1, (3, -1, head_size))
    for head in range(parts.shape[2]):
        q, k, v = parts[:, :, head].unbind(1)
        attend_in_place(q, k, v, angles)
    return parts[:, 0].flatten(-2).contiguous()


def attend_in_place(q: Tensor, k: Tensor, v: Tensor, angles: Tensor) -> None:
    """One head (M, size): the result over q."""
    rows, size = q.shape
    turned, keys = (rotated(F.rms_norm(part, (size,)), angles) for part in (q, k))
    for start in range(0, rows, ATTENTION_ROWS):
        some = slice(start, start + ATTENTION_ROWS)
        scores = (turned[some] @ keys.T).float().mul_(size**-0.5)
        q[some] = torch.softmax(scores, -1).to(v.dtype) @ v


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., M, head) by angles (M, head / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
