"""Models that are quantized already are refused by the name of their scheme, not by what goes wrong later."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.source.tensors import StoredTensor, entry_bytes
from svdq_cli.storage.tensor_file import bytes_of

_HINT = "convert the 16-bit model it was made from"
_SVDQUANT_HINT = f"{_HINT}; svdq export re-packs a finished checkpoint for another runtime"


@dataclass(frozen=True, slots=True)
class Scheme:
    """A quantization scheme, told by keys: every pattern must be found in some key."""

    name: str
    patterns: tuple[str, ...]
    hint: str = _HINT


# The first that matches is named. Key suffixes are those that each project's own writer uses.
SCHEMES = (
    Scheme(
        "SVDQuant (comfy-kitchen)", (r"\.proj_down$", r"\.smooth_factor$", r"\.comfy_quant$"), _SVDQUANT_HINT
    ),
    Scheme("SVDQuant (nunchaku)", (r"\.qweight$", r"\.wscales$"), _SVDQUANT_HINT),
    Scheme("GPTQ", (r"\.qweight$", r"\.qzeros$", r"\.g_idx$")),
    Scheme("AWQ", (r"\.qweight$", r"\.qzeros$")),
    Scheme("bitsandbytes NF4", (r"\.quant_state\.bitsandbytes__nf4$",)),
    Scheme("bitsandbytes FP4", (r"\.quant_state\.bitsandbytes__fp4$",)),
    Scheme("bitsandbytes 4-bit", (r"\.weight\.absmax$", r"\.weight\.quant_map$")),
    Scheme("bitsandbytes INT8", (r"\.SCB$",)),
    Scheme("quanto", (r"\.weight\._data(\._data)?$", r"\.weight\._scale$")),
    Scheme("compressed-tensors", (r"\.weight_packed$",)),
    Scheme("NVFP4", (r"\.weight_scale_2$",)),
    Scheme("block-scaled FP8", (r"\.weight_scale_inv$",)),
    Scheme("HQQ", (r"\.W_q$",)),
    Scheme("NVIDIA ModelOpt", (r"_quantizer\._(amax|scale|double_scale|pre_quant_scale)$",)),
    Scheme("SDNQ", (r"\.svd_up$", r"\.svd_down$", r"\.scale$")),
    Scheme("AQLM", (r"\.codebooks$", r"\.codes$")),
    Scheme("VPTQ", (r"\.centroids(\.weight)?$", r"\.indices$")),
    Scheme("HIGGS", (r"\.tables$", r"\.tables2$")),
    Scheme("MLX", (r"\.scales$", r"\.biases$")),
    Scheme("Marlin", (r"\.workspace$", r"\.B$", r"\.s$")),
    Scheme("torchao", (r"[._:](weight_)?q?data$", r"[._:](weight_)?scale$")),
)
# What `quant_method` says, where the project is known by another name
_METHOD_NAMES = {
    "nunchaku_lite": "SVDQuant (nunchaku-lite)",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "fp8": "block-scaled FP8",
    "modelopt": "NVIDIA ModelOpt",
    "sdnq": "SDNQ",
}
_LABEL_BYTES = 1 << 16  # of a layer's `comfy_quant`; ComfyUI's have 100
_UNREADABLE = "quantization of an unreadable kind"
# of ComfyUI's per-layer `comfy_quant`: svdq reads these two
_FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def refuse_quantized(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raises InputError (kind `already-quantized`) naming the scheme, the file and the cure."""
    for scheme in SCHEMES:
        found = [_first_match(pattern, tensors) for pattern in scheme.patterns]
        if all(found):
            raise already_quantized(path, scheme.name, where=str(found[0]), hint=scheme.hint)
    for name, entry in tensors.items():
        if name.endswith(".comfy_quant") and (scheme_name := _comfy_format(entry)) not in _FLOAT8_FORMATS:
            raise already_quantized(path, f"ComfyUI {scheme_name}", where=name)


def refuse_quantized_config(folder: Path, config: Mapping[str, object]) -> None:
    """Refuse a model that is already quantized, by the `quantization_config` in its diffusers config."""
    found = config.get("quantization_config")
    if found is None:
        return
    name = quantizer_of(found)
    hint = _SVDQUANT_HINT if "SVDQuant" in name else _HINT
    raise already_quantized(folder, name, where=str(folder), hint=hint)


def quantizer_of(quantization_config: object) -> str:
    """The name of the quantizer that a config's `quantization_config` speaks of."""
    said = quantization_config if isinstance(quantization_config, Mapping) else {}
    method = said.get("quant_method")
    return _METHOD_NAMES.get(str(method), str(method or "unknown method"))


def already_quantized(path: Path, scheme: str, *, where: str, hint: str = _HINT) -> InputError:
    return InputError(
        f"{path}: this model is already quantized ({scheme})",
        hint=hint,
        where=where,
        kind="already-quantized",
    )


def _first_match(pattern: str, names: Mapping[str, StoredTensor]) -> str | None:
    search = re.compile(pattern).search
    return next((name for name in names if search(name)), None)


def _comfy_format(entry: StoredTensor) -> str:
    """What a layer's `comfy_quant` says: JSON text as bytes."""
    if entry_bytes(entry) > _LABEL_BYTES:
        return _UNREADABLE
    try:
        said = json.loads(bytes_of(entry.read()).numpy().tobytes())
    except (ValueError, RecursionError):
        return _UNREADABLE
    return str(said.get("format")) if isinstance(said, dict) else _UNREADABLE
