"""T5 text encoders with 4-bit weights, in the layout that transformers loads by itself.

`compressed-tensors`, format `pack-quantized`: of every linear layer
    weight_packed (N, K/8) int32   eight codes a word, the first in the lowest bits, stored plus 8
    weight_scale  (N, K/64)        16-bit, symmetric: weight = code * scale
    weight_shape  (2,) int64       N, K
and `quantization_config` in config.json. transformers unpacks it when it loads (`dequantize`): files are small, memory
is that of 16 bit. It can't do otherwise with T5, whose feed-forward network asks its output layer for `weight`.

Source: compressed-tensors 0.20, compressors/pack_quantized; transformers 5, quantizer_compressed_tensors. Loading needs
the compressed-tensors package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from svdq_cli.errors import InputError
from svdq_cli.records import Int4
from svdq_cli.solve.quantizers import quantize_weight
from svdq_cli.source import is_finite, pipeline_index
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.tensor_file import save_tensors

ARCHITECTURES = ("T5EncoderModel", "UMT5EncoderModel")
_LINEAR = re.compile(r"\.(SelfAttention\.[qkvo]|DenseReluDense\.w[io](_\d)?)\.weight$")
_CODES_PER_WORD = 8
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def require_encoders(pipeline: Path | None, names: Iterable[str]) -> None:
    """Refuses early what `quantize_encoder` could not do. `pipeline`: the folder that the components come from."""
    for name in names:
        folder = pipeline / name if pipeline and name in pipeline_index(pipeline) else None
        if folder is None or not (folder / "config.json").is_file():
            raise InputError(
                f"components: there is no {name!r}"
                + (f" in {pipeline}" if pipeline else ": this is not a pipeline"),
                hint="name a text encoder of the pipeline, such as text_encoder_2",
                where=name,
            )
        architectures = read_json(folder / "config.json").get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else "unknown"
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"components: {name} is a {architecture}, but svdq quantizes only {' and '.join(ARCHITECTURES)}",
                hint=f"drop {name} from components",
                where=str(folder),
            )


def quantize_encoder(folder: Path, *, dtype: torch.dtype) -> None:
    """Turns a T5 encoder's folder, 16-bit or more, into its 4-bit form, in place.

    `dtype` is that of scales and of everything that stays at 16 bits. Layers whose input is not a multiple of 64 stay,
    too. Raises InputError for damaged weights.
    """
    files = _weight_files(folder)
    stored: dict[str, Tensor] = {}
    kept_linears: list[str] = []
    for file in files:
        for name, tensor in load_file(file).items():
            if not is_finite(tensor):
                raise InputError(
                    f"{file}: {name} holds NaN or infinite values", hint="download it again", where=name
                )
            if not is_finite(tensor.to(dtype)):
                raise InputError(
                    f"{file}: {name} holds numbers above {torch.finfo(dtype).max:g}, the largest of {str(dtype)[6:]}",
                    hint="convert with dtype: bfloat16 (model.dtype in the recipe)",
                    where=name,
                    kind="out-of-range",
                )
            if _LINEAR.search(name) is None:
                stored[name] = tensor.to(dtype)
            elif tensor.shape[1] % Int4.group:
                stored[name] = tensor.to(dtype)
                kept_linears.append(name.removesuffix(".weight"))
            else:
                stored |= {f"{name}_{part}": value for part, value in _packed(tensor, dtype).items()}
    config = {**read_json(folder / "config.json"), "quantization_config": _quantization_config(kept_linears)}
    for file in files:
        file.unlink()
    (folder / _INDEX).unlink(missing_ok=True)
    save_tensors(folder / _WEIGHTS, stored, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pack_words(codes: Tensor) -> Tensor:
    """Codes (N, K) in [-8, 7] -> (N, K/8) int32."""
    shifted = (codes.to(torch.int64) + 8).unflatten(-1, (-1, _CODES_PER_WORD))
    words = (shifted << (4 * torch.arange(_CODES_PER_WORD))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of `pack_words`: (N, K/8) int32 -> (N, K) int8."""
    nibbles = (words.unsqueeze(-1) >> (4 * torch.arange(_CODES_PER_WORD, dtype=torch.int32))) & 15
    return (nibbles.flatten(-2) - 8).to(torch.int8)


def _packed(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    quantized = quantize_weight(weight.float(), Int4(), dtype=dtype)
    return {
        "packed": pack_words(quantized.codes),
        "scale": quantized.scales.contiguous(),
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _quantization_config(ignored: list[str]) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": Int4.group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": True,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignored,
    }


def _weight_files(folder: Path) -> list[Path]:
    """The encoder's safetensors: one file, or the shards that its index names."""
    if (folder / _INDEX).is_file():
        shards = cast("dict[str, str]", read_json(folder / _INDEX)["weight_map"])
        files = [folder / Path(name).name for name in sorted(set(shards.values()))]
    else:
        files = [folder / _WEIGHTS]
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{file}: the weights are missing", hint="download the folder again", where=str(file)
            )
    return files
