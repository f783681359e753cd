"""Arguments for a model's `forward`, made up from its signature and its config.

`MAKERS` says what an argument of a name takes in any model; `OF_CLASS` what single classes want instead. Widths that no
config key tells are found out: an argument gets a width of its own (a prime), and the first layer that reads it says
which it wanted (`WidthMismatch`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TEXT = 12  # text tokens
_GRID = 8  # tokens along each side of an image
_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097)


@dataclass(frozen=True, slots=True)
class Extent:
    """How large the latents are: their layout, letters of B batch, C channels, F frames, H and W, N packed tokens."""

    layout: str
    side: int
    frames: int = 1


class WidthMismatch(Exception):
    """A layer read `found` channels where its weights have `wanted`."""

    def __init__(self, found: int, wanted: int) -> None:
        super().__init__(f"{found} channels where {wanted} are wanted")
        self.found = found
        self.wanted = wanted


@dataclass(slots=True)
class World:
    """What the arguments of one call agree upon."""

    config: Mapping[str, Any]
    extent: Extent
    widths: dict[str, int] = field(default_factory=dict[str, int])

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of these config keys that has a value."""
        return next((v for key in keys if (v := self.config.get(key)) is not None), default)

    def width(self, argument: str, *keys: str) -> int:
        """The width of an argument: from the config, or found by trial."""
        if argument not in self.widths:
            told = self.get(*keys)
            if isinstance(told, (list, tuple)) and told:
                told = told[0]
            free = next(p for p in _PRIMES if p not in self.widths.values())
            self.widths[argument] = told if isinstance(told, int) and told > 0 else free
        return self.widths[argument]

    def correct(self, mismatch: WidthMismatch) -> bool:
        """Give the argument that was too narrow or too wide another width. False where none has the width found."""
        for argument, width in self.widths.items():
            times, rest = divmod(mismatch.found, width)
            if rest == 0 and mismatch.wanted % times == 0 and width != mismatch.wanted // times:
                self.widths[argument] = mismatch.wanted // times
                return True
        return False

    @property
    def text(self) -> int:
        """Text tokens: few, unless the model wants a number of its own."""
        own = self.get("max_text_seq_length", "text_seq_length")
        return own if isinstance(own, int) and own <= 512 else TEXT

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of one token."""
        size = self.get("patch_size", default=1)
        if isinstance(size, (list, tuple)):
            time, *space = size if len(size) == 3 else (1, *size)
            return int(time), int(space[0]), int(space[-1])
        time = self.get("patch_size_t", "temporal_patch_size", default=1)
        return int(time or 1), int(size), int(size)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens in time, height, width."""
        if "N" in self.extent.layout:
            return self.extent.frames, _GRID, _GRID
        time, rows, columns = self.patch
        return (
            max(1, self.extent.frames // time),
            max(1, self.extent.side // rows),
            max(1, self.extent.side // columns),
        )

    @property
    def tokens(self) -> int:
        time, rows, columns = self.grid
        return time * rows * columns

    def latents(self, argument: str, *keys: str) -> Tensor:
        """As the model lays them out: (B, C, H, W), (B, C, F, H, W), (B, N, C) and others."""
        sizes = {
            "B": 1,
            "C": self.width(argument, *keys, *_CHANNELS),
            "F": self.extent.frames,
            "H": self.extent.side,
            "W": self.extent.side,
            "N": self.tokens,
        }
        return floats(*(sizes[letter] for letter in self.extent.layout))


_CHANNELS = (
    "in_channels",
    "in_dim",
    "in_visual_dim",
    "input_dim",
    "num_channels",
    "in_channel",
    "latent_dim",
)
_TEXT_WIDTHS = (
    "joint_attention_dim",
    "caption_channels",
    "text_embed_dim",
    "text_dim",
    "in_text_dim",
    "cap_feat_dim",
    "encoder_hid_dim",
    "caption_dim",
    "text_in_dim",
    "text_hidden_dim",
    "cross_attention_dim",
)


def floats(*shape: int) -> Tensor:
    """Random numbers of a standard normal, of any shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)


def longs(*shape: int) -> Tensor:
    """Zeros of 64 bits, of any shape."""
    return torch.zeros(shape, dtype=torch.long)


def positions(*sizes: int, axes: int = 3) -> Tensor:
    """(tokens, axes): the coordinates of a grid of tokens, zeros before them where a grid has fewer axes."""
    grid = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes))
    return torch.cat([torch.zeros(len(grid), max(0, axes - len(sizes)), dtype=torch.long), grid], dim=1)[
        :, -axes:
    ]


def _text(world: World, name: str) -> Tensor:
    return floats(1, world.text, world.width(name, *_TEXT_WIDTHS))


def _ids(world: World, name: str) -> Tensor | None:
    axes = world.get("axes_dims_rope", "axes_dim", "rope_axes_dim", "axes_dims")
    count = len(axes) if isinstance(axes, (list, tuple)) else 3
    if name.startswith("txt"):
        return torch.zeros(world.text, count, dtype=torch.float32)
    return positions(*world.grid, axes=count).float()


Maker = Callable[[World, str], Any]

# What diffusers' models call the argument that says the time
TIME = r"t|timesteps?|time_step|timestep_r|r_timestep|sigma|timestep_ratio|target_timestep"

# In this order, the first that matches an argument's name makes it.
MAKERS: tuple[tuple[str, Maker], ...] = (
    (
        r"(encoder_attention|text_embedding|encoder|encoder_hidden_states|attention|img)_mask\w*",
        lambda w, n: torch.ones(1, w.text, dtype=torch.bool),
    ),
    (r"hidden_states|sample|x|latents", lambda w, n: w.latents(n)),
    (
        r"encoder_hidden_states_image|image_embeds?|image_embeddings",
        lambda w, n: floats(1, 8, w.width(n, "image_dim", "image_embed_dim")),
    ),
    (r"encoder_hidden_states\w*|context|cap_feats|text_embeds?|prompt_embeds|text_bth", _text),
    (TIME, lambda w, n: torch.tensor([0.5], dtype=torch.float32)),
    (
        r"guidance",
        lambda w, n: (
            torch.tensor([3.5], dtype=torch.float32) if w.get("guidance_embeds", "guidance_embed") else None
        ),
    ),
    (
        r"pooled_\w*|clip_text_pooled|global_hidden_states",
        lambda w, n: floats(1, w.width(n, "pooled_projection_dim", "in_text_dim2", "text_embed_2_dim")),
    ),
    (r"class_labels", lambda w, n: longs(1)),
    (r"(img|image|txt|text)_ids", _ids),
    (r"original_size|target_size", lambda w, n: torch.full((1, 2), 8.0 * w.extent.side, dtype=torch.float32)),
    (r"crop_coords", lambda w, n: torch.zeros(1, 2, dtype=torch.float32)),
    (r"img_shapes", lambda w, n: [[w.grid]]),
    (r"num_frames", lambda w, n: w.grid[0]),
    (r"height", lambda w, n: w.grid[1]),
    (r"width", lambda w, n: w.grid[2]),
    (r"fps", lambda w, n: torch.tensor([16])),
    (r"text_lens", lambda w, n: torch.tensor([w.text], dtype=torch.int64)),
)


# Arguments that are given though `forward` has a default for them
GIVEN = re.compile(
    r"hidden_states|sample|encoder_hidden_states|timesteps?|guidance|pooled_\w*|(img|txt|image|text)_ids|img_shapes|img_sizes|num_frames|height|width|global_hidden_states|original_size|target_size|crop_coords"
)


def made(world: World, name: str, of_class: Mapping[str, Maker]) -> Any:
    """A value for an argument of that name; None where no one knows one."""
    if name in of_class:
        return of_class[name](world, name)
    maker = next((maker for pattern, maker in MAKERS if re.fullmatch(pattern, name)), None)
    return None if maker is None else maker(world, name)


def extents(model: nn.Module) -> list[Extent]:
    """Layouts that the latents may have, the likeliest first."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    video = re.search(r"3D|Video|Temporal|Motion", type(model).__name__) is not None
    layouts = {
        nn.Conv3d: ["BCFHW", "BNC", "BFCHW", "BFHWC", "BCHW"],
        nn.Conv2d: ["BFCHW", "BCFHW", "BCHW", "BNC"] if video else ["BCHW", "BNC", "BCFHW", "BFCHW"],
        nn.Conv1d: ["BCN", "BNC", "BCHW"],
        type(None): ["BNC", "BCFHW", "BFHWC", "BCHW"]
        if video
        else ["BNC", "BCHW", "BNC", "BCFHW", "BCN", "BFHWC"],
    }[type(first)]
    config = dict(getattr(model, "config", {}))
    patch = World(config, Extent("BCHW", 0)).patch
    # few tokens where the size of one is known; a UNet halves the image several times
    first = _GRID * patch[1] if "patch_size" in config else 2 * _GRID
    sizes = ((first, 4), (32, 5), (64, 9))
    return [
        Extent(layout, side, frames if video or "F" in layout else 1)
        for side, frames in sizes
        for layout in dict.fromkeys(layouts)
    ]


def calls(model: nn.Module, of_class: Mapping[str, Maker]) -> Iterator[Call]:
    """Calls of `forward` to try, the likeliest first."""
    config = dict(getattr(model, "config", {}))
    parameters = {
        name: p
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    for extent in extents(model):
        yield Call(World(config, extent), parameters, of_class)


@dataclass(slots=True)
class Call:
    """One way to call a model. Its arguments are made again every time, with the widths known by then."""

    world: World
    parameters: Mapping[str, inspect.Parameter]
    of_class: Mapping[str, Maker]

    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if name == "return_dict":
                found[name] = False
                continue
            required = parameter.default is inspect.Parameter.empty
            if not required and name not in self.of_class and not re.fullmatch(GIVEN, name):
                continue
            value = made(self.world, name, self.of_class)
            if value is not None or (required and name in self.of_class):
                found[name] = value
            elif required:
                raise TypeError(f"unknown argument {name}")
        return found
