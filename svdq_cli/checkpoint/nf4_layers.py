"""How bitsandbytes stores an NF4 layer, which transformers, and so diffusers, reads by itself.

Of a weight NAME (N, K), in blocks of 64 along its rows:
    NAME                    (N*K/2, 1) uint8    two codes a byte, the first in the high half
    NAME.absmax             (N*K/64,) uint8     the blocks' scales in 8 bits
    NAME.quant_map          (16,) float32       the levels of codes
    NAME.nested_absmax      (N*K/64/256,)       float32, one for 256 scales
    NAME.nested_quant_map   (256,) float32      the levels of scales
    NAME.quant_state.bitsandbytes__nf4          uint8: JSON with shape and dtype
and `quantization_config` in config.json. Source: bitsandbytes 0.50, functional.QuantState.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_cli.solve.nf4 import GROUP, LEVELS, SCALES_IN_BLOCK, Nf4Solution, StoredScales, decode, scale_levels
from svdq_cli.storage.tensor_file import TensorSpec

STATE = "quant_state.bitsandbytes__nf4"
# of a layer besides its codes
LAYER_TENSORS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
_STATE_BYTES = 256  # JSON padded with spaces: all layers alike


def stored_specs(name: str, out_features: int, in_features: int) -> dict[str, TensorSpec]:
    """The tensors of one layer. `name`: that of its 16-bit weight."""
    scales = out_features * in_features // GROUP
    return {
        name: TensorSpec((out_features * in_features // 2, 1), torch.uint8),
        f"{name}.absmax": TensorSpec((scales,), torch.uint8),
        f"{name}.quant_map": TensorSpec((len(LEVELS),), torch.float32),
        f"{name}.nested_absmax": TensorSpec((-(-scales // SCALES_IN_BLOCK),), torch.float32),
        f"{name}.nested_quant_map": TensorSpec((256,), torch.float32),
        f"{name}.{STATE}": TensorSpec((_STATE_BYTES,), torch.uint8),
    }


def encode(name: str, solution: Nf4Solution, dtype: torch.dtype) -> dict[str, Tensor]:
    """One layer's tensors as `stored_specs` announces them. `dtype`: what the runtime computes in."""
    said = {
        "quant_type": "nf4",
        "blocksize": GROUP,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(solution.codes.shape),
        "nested_blocksize": SCALES_IN_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": 0.0,
    }
    text = json.dumps(said).encode().ljust(_STATE_BYTES)
    pairs = solution.codes.reshape(-1, 2)
    return {
        name: ((pairs[:, 0] << 4) | pairs[:, 1]).unsqueeze(1),
        f"{name}.absmax": solution.scales.codes,
        f"{name}.quant_map": torch.tensor(LEVELS, dtype=torch.float32),
        f"{name}.nested_absmax": solution.scales.sizes,
        f"{name}.nested_quant_map": scale_levels(),
        f"{name}.{STATE}": torch.tensor(list(text), dtype=torch.uint8),
    }


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeight:
    """A layer's weight as it is in a file, decoded some rows at a time."""

    shape: tuple[int, int]  # N, K
    packed: Tensor  # (N*K/2,) uint8
    scales: Tensor  # (N, K/64) float32

    def rows(self, part: slice) -> Tensor:
        """Some rows of the weight, (n, K) float32."""
        start, stop, _ = part.indices(self.shape[0])
        width = self.shape[1]
        packed = self.packed[start * width // 2 : stop * width // 2]
        codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1, width)
        return (decode(codes).unflatten(1, (-1, GROUP)) * self.scales[part].unsqueeze(2)).flatten(1)


def stored_weight(name: str, tensors: Mapping[str, Tensor]) -> StoredWeight:
    """What `encode` wrote. ValueError for what it did not write."""
    said = json.loads(bytes(tensors[f"{name}.{STATE}"].tolist()))
    packed, shape = tensors[name].flatten(), said["shape"]
    if said["blocksize"] != GROUP or said["nested_blocksize"] != SCALES_IN_BLOCK or len(shape) != 2:
        raise ValueError("another block size than svdq writes")
    rows, width = map(int, shape)
    if rows * width != 2 * packed.numel() or width % GROUP:
        raise ValueError(f"{packed.numel()} bytes of codes for {rows} x {width} weights")
    if said["nested_offset"] != 0 or not torch.equal(tensors[f"{name}.nested_quant_map"], scale_levels()):
        raise ValueError("other levels of scales than svdq writes")
    stored = StoredScales(tensors[f"{name}.absmax"], tensors[f"{name}.nested_absmax"])
    return StoredWeight((rows, width), packed, stored.values.view(rows, -1))


def packed_weights(names: Iterable[str]) -> tuple[str, ...]:
    """The weights in a file that are stored in 4 bits."""
    return tuple(name.removesuffix(f".{STATE}") for name in names if name.endswith(f".{STATE}"))


def stored_config(config: Mapping[str, object], dtype: torch.dtype, kept: Iterable[str]) -> dict[str, object]:
    """The config.json of a model with 4-bit layers. `kept`: linear layers that stay at 16 bits."""
    name = str(dtype).removeprefix("torch.")
    section = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": name,
        "llm_int8_skip_modules": sorted(kept),
    }
    # transformers 5 loads weights of norms and embeddings next to 4-bit layers as they are stored, and biases in the
    # dtype that it is asked for: this is the one that goes with them where nobody asks
    own = {key: value for key, value in config.items() if key != "torch_dtype"}
    return {**own, "dtype": name, "quantization_config": section}
