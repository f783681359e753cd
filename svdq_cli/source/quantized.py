"""Models that are quantized already are refused by the name of their scheme, not by what goes wrong later."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.source.tensors import TensorEntry, entry_bytes
from svdq_cli.storage.json_files import read_json
from svdq_cli.storage.tensor_file import bytes_of

_HINT = "convert the 16-bit model it was made from"
_SVDQUANT_HINT = f"{_HINT}; svdq export re-packs a finished checkpoint for another runtime"
# ModelOpt's export: one scale a tensor, which is read from files
_FLOAT8_HINT = f"{_HINT}; where only 8 bits are left, give the weight file with --base and a 16-bit pipeline"


@dataclass(frozen=True, slots=True)
class Scheme:
    """A quantization scheme, told by keys: every pattern must be found in some key; the first one's tensor is stored in
    one of `dtypes`, where there are any."""

    name: str
    patterns: tuple[str, ...]
    hint: str = _HINT
    dtypes: tuple[str, ...] = ()

    def found_in(self, tensors: Mapping[str, TensorEntry]) -> str | None:
        """The key that the first pattern is found in, if this is the scheme of a file with these tensors."""
        first, *others = (re.compile(pattern).search for pattern in self.patterns)
        if not all(any(map(search, tensors)) for search in others):
            return None
        fits = (name for name in tensors if first(name))
        return next((name for name in fits if not self.dtypes or tensors[name].dtype in self.dtypes), None)


# The first that matches is named: SVDQuant, then what ComfyUI's labels say, then the others. Key suffixes are those
# that each project's own writer uses.
_SVDQUANT = (
    Scheme(
        "SVDQuant (comfy-kitchen)", (r"\.proj_down$", r"\.smooth_factor$", r"\.comfy_quant$"), _SVDQUANT_HINT
    ),
    Scheme("SVDQuant (nunchaku)", (r"\.qweight$", r"\.wscales$"), _SVDQUANT_HINT),
)
_OTHERS = (
    Scheme("GPTQ", (r"\.qweight$", r"\.qzeros$", r"\.g_idx$")),
    Scheme("AWQ", (r"\.qweight$", r"\.qzeros$")),
    Scheme("bitsandbytes NF4", (r"\.quant_state\.bitsandbytes__nf4$",)),
    Scheme("bitsandbytes FP4", (r"\.quant_state\.bitsandbytes__fp4$",)),
    Scheme("bitsandbytes 4-bit", (r"\.weight\.absmax$", r"\.weight\.quant_map$")),
    Scheme("bitsandbytes INT8", (r"\.SCB$",)),
    Scheme("quanto", (r"\.weight\._data(\._data)?$", r"\.weight\._scale$")),
    Scheme("compressed-tensors", (r"\.weight_packed$",)),
    Scheme("NVFP4", (r"\.weight_scale_2$",)),
    # powers of two, one for 32 inputs: ModelOpt stores them as bytes
    Scheme("MXFP8 or MXFP4", (r"\.(weight_scale|scale_weight)$",), dtypes=("U8", "F8_E8M0")),
    Scheme("block-scaled FP8", (r"\.weight_scale_inv$",)),
    Scheme("HQQ", (r"\.W_q$",)),
    Scheme("NVIDIA ModelOpt", (r"_quantizer\._(amax|scale|double_scale|pre_quant_scale)$",)),
    Scheme("AMD Quark", (r"\._(weight|input)_quantizer(\.\d+)?\.scale$",)),
    Scheme("SDNQ", (r"\.svd_up$", r"\.svd_down$", r"\.scale$")),
    Scheme("AQLM", (r"\.codebooks$", r"\.codes$")),
    Scheme("VPTQ", (r"\.centroids(\.weight)?$", r"\.indices$")),
    Scheme("HIGGS", (r"\.tables$", r"\.tables2$")),
    Scheme("NNCF", (r"^__nncf_hooks\.",)),
    Scheme("MLX", (r"\.scales$", r"\.biases$")),
    # without offsets: its mxfp4, mxfp8 and nvfp4
    Scheme("MLX", (r"\.weight$", r"\.scales$"), dtypes=("U32",)),
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
    "quark": "AMD Quark",
    "sdnq": "SDNQ",
}
_LABEL_BYTES = 1 << 16  # of a layer's `comfy_quant`; ComfyUI's have 100
_UNREADABLE = "quantization of an unreadable kind"
_UNNAMED = "layers of an unnamed format"  # as nodes that know their own files write them
# of ComfyUI's per-layer `comfy_quant`: svdq reads these two
_FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2")


def refuse_quantized(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Raises InputError (kind `already-quantized`) naming the scheme, the file and the cure."""
    _refuse_schemes(path, tensors, _SVDQUANT)
    for name, entry in tensors.items():
        if name.endswith(".comfy_quant") and (scheme_name := _comfy_format(entry)) not in _FLOAT8_FORMATS:
            raise already_quantized(path, f"ComfyUI {scheme_name}", where=name)
    _refuse_schemes(path, tensors, _OTHERS)


def _refuse_schemes(path: Path, tensors: Mapping[str, TensorEntry], schemes: Iterable[Scheme]) -> None:
    for scheme in schemes:
        if found := scheme.found_in(tensors):
            raise already_quantized(path, scheme.name, where=found, hint=scheme.hint)


def refuse_quantized_config(folder: Path, config: Mapping[str, object]) -> None:
    """Refuse a model that is already quantized, by the `quantization_config` in its diffusers config."""
    found = config.get("quantization_config")
    if found is None:
        return
    name = quantizer_of(found)
    hint = _SVDQUANT_HINT if "SVDQuant" in name else _HINT
    if isinstance(found, Mapping) and found.get("quant_algo") == "FP8":
        hint = _FLOAT8_HINT
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


def quantizer_beside(path: Path) -> str | None:
    """The quantizer that the config next to a weight file, or in a model's folder, speaks of."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        found = read_json(file).get("quantization_config") if file.is_file() else None
    except InputError:
        return None
    return None if found is None else quantizer_of(found)


def _comfy_format(entry: TensorEntry) -> str:
    """What a layer's `comfy_quant` says: JSON text as bytes."""
    if entry_bytes(entry) > _LABEL_BYTES:
        return _UNREADABLE
    try:
        said = json.loads(bytes_of(entry.read()).numpy().tobytes())
    except (ValueError, RecursionError):
        return _UNREADABLE
    return str(said.get("format") or _UNNAMED) if isinstance(said, dict) else _UNREADABLE
