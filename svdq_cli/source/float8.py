"""8-bit float checkpoints: every tensor is found its scale, if it has one, and is up-converted when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.source.quantized import already_quantized
from svdq_cli.source.tensors import SIXTEEN_BIT_OR_MORE, Float8Tensor, StoredTensor, TensorEntry

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's two spellings
_NOT_WEIGHTS = (
    ".scale_input",
    ".input_scale",
    ".comfy_quant",
)  # activation scales and labels: of no use at 16 bit
_MARKER = "scaled_fp8"


def float8_upconverted(
    path: Path, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, TensorEntry], tuple[str, ...]]:
    """The tensors at 16 bit or more, and a warning if some were not. Names stay as they are.

    Raises InputError (kind `already-quantized`) for tensors of fewer bits, naming the first.
    """
    upconverted = {
        name: Float8Tensor(entry, _scale_of(path, name, entry, stored))
        for name, entry in stored.items()
        if entry.dtype in FLOAT8 and name != _MARKER
    }
    spent = {entry.scale.origin for entry in upconverted.values() if entry.scale is not None}
    tensors: dict[str, TensorEntry] = {}
    for name, entry in stored.items():
        if name in upconverted:
            tensors[name] = upconverted[name]
        elif name == _MARKER or entry.origin in spent or name.endswith(_NOT_WEIGHTS):
            continue
        elif entry.dtype in SIXTEEN_BIT_OR_MORE:
            tensors[name] = entry
        else:
            raise already_quantized(path, f"{name} is stored as {entry.dtype}", where=name)
    return tensors, _warning(path, upconverted)


def _scale_of(
    path: Path, name: str, entry: StoredTensor, stored: Mapping[str, StoredTensor]
) -> StoredTensor | None:
    layer = name.removesuffix(".weight")
    if layer == name:
        return None
    scale = next((stored[f"{layer}.{word}"] for word in _SCALES if f"{layer}.{word}" in stored), None)
    if scale is None or scale.shape in ((), (1,), (1, 1), entry.shape[:1], (*entry.shape[:1], 1)):
        return scale
    raise InputError(
        f"{path}: {scale.origin} has shape {list(scale.shape)}; svdq reads one scale per tensor or per output row",
        hint="convert from the 16-bit model",
        where=name,
        kind="already-quantized",
    )


def _warning(path: Path, upconverted: Mapping[str, Float8Tensor]) -> tuple[str, ...]:
    if not upconverted:
        return ()
    scaled = sum(entry.scale is not None for entry in upconverted.values())
    how = f"{scaled} of them times their scale" if scaled else "they have no scales"
    return (
        f"{path}: {len(upconverted)} tensors are 8-bit floats and were up-converted to bfloat16 ({how}); "
        "what 8 bits have lost stays lost, so prefer the 16-bit model where there is one",
    )
