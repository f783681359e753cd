"""Every layout against bytes that another implementation wrote (tests/golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdq_cli.pack.codes import pack_codes, unpack_codes
from svdq_cli.pack.low_rank import pack_down, pack_up, unpack_down, unpack_up
from svdq_cli.pack.padding import crop, pad
from svdq_cli.pack.scales import (
    pack_micro_scales,
    pack_scales,
    pack_vector,
    unpack_micro_scales,
    unpack_scales,
    unpack_vector,
)
from svdq_cli.pack.w4a16 import (
    deinterleave_adanorm,
    interleave_adanorm,
    pack_w4a16_codes,
    pack_w4a16_scales,
    unpack_w4a16_codes,
    unpack_w4a16_scales,
)
from svdq_cli.records import Int4, NvFp4, Precision

GOLDEN = Path(__file__).parents[1] / "golden"
W4A4_FILES = sorted(path.stem for path in GOLDEN.glob("pack_*.safetensors"))
W4A16_FILES = sorted(path.stem for path in GOLDEN.glob("awq_*.safetensors"))

Transform = Callable[[Tensor], Tensor]


def layouts(precision: Precision) -> dict[str, tuple[Transform, Transform, tuple[int, ...], float]]:
    """Per golden tensor: pack, unpack, tile multiples, padding."""
    micro = isinstance(precision, NvFp4)
    return {
        "qweight": (
            lambda codes: pack_codes(codes, precision),
            lambda qweight: unpack_codes(qweight, precision),
            (128, 128),
            0,
        ),
        "wscales": (pack_micro_scales, unpack_micro_scales, (128, 8), 1)
        if micro
        else (pack_scales, unpack_scales, (128, 2), 1),
        "bias": (pack_vector, unpack_vector, (128,), 1),
        "smooth": (pack_vector, unpack_vector, (128,), 1),
        "wcscales": (pack_vector, unpack_vector, (128,), 1),
        "lora_down": (pack_down, unpack_down, (16, 128), 0),
        "lora_up": (pack_up, unpack_up, (128, 16), 0),
    }


def plain_name(stored: str) -> str:
    return {"qweight": "codes", "wscales": "scales"}.get(stored, stored)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


@pytest.mark.parametrize("name", W4A4_FILES)
def test_every_w4a4_tensor_packs_to_the_golden_bytes_and_back(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    precision = NvFp4() if "nvfp4" in name else Int4()
    stored_names = {key.removeprefix("packed.") for key in file if key.startswith("packed.")}
    assert {"qweight", "wscales", "bias", "smooth", "lora_down", "lora_up"} <= stored_names
    for stored_name in stored_names:
        pack, unpack, multiples, fill = layouts(precision)[stored_name]
        plain, stored = file[f"in.{plain_name(stored_name)}"], file[f"packed.{stored_name}"]
        assert same_bytes(pack(pad(plain, multiples=multiples, fill=fill)), stored), stored_name
        assert same_bytes(crop(unpack(stored), shape=plain.shape), plain), stored_name


@pytest.mark.parametrize("name", W4A16_FILES)
def test_every_w4a16_tensor_packs_to_the_golden_bytes_and_back(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    parts = int(name.rsplit("split", 1)[1])
    scales = interleave_adanorm(file["in.scales"], parts=parts)
    codes = interleave_adanorm(file["in.codes"], parts=parts) + 7
    zeros = -(scales * 7)
    assert same_bytes(pack_w4a16_codes(codes), file["packed.qweight"])
    assert same_bytes(pack_w4a16_scales(scales), file["packed.wscales"])
    assert same_bytes(pack_w4a16_scales(zeros), file["packed.wzeros"])

    found = unpack_w4a16_codes(file["packed.qweight"]).to(torch.int8) - 7
    assert same_bytes(deinterleave_adanorm(found, parts=parts), file["in.codes"])
    found = unpack_w4a16_scales(file["packed.wscales"])
    assert same_bytes(deinterleave_adanorm(found, parts=parts), file["in.scales"])


@pytest.mark.parametrize("name", W4A16_FILES)
def test_classic_adanorm_bias_is_interleaved_with_one_added_to_the_scale_parts(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    parts = int(name.rsplit("split", 1)[1])
    bias = file["in.bias"].clone().unflatten(0, (parts, -1))
    if parts > 1:
        for part in {1, parts - 2}:
            bias[part] += 1
    assert same_bytes(interleave_adanorm(bias.flatten(), parts=parts), file["packed.bias"])


@pytest.mark.parametrize("name", W4A16_FILES)
def test_unpacked_w4a16_weights_give_the_golden_output(name: str) -> None:
    file = load_file(GOLDEN / f"{name}.safetensors")
    codes = unpack_w4a16_codes(file["packed.qweight"]).double().unflatten(1, (-1, 64))
    scales = unpack_w4a16_scales(file["packed.wscales"]).double().unsqueeze(-1)
    zeros = unpack_w4a16_scales(file["packed.wzeros"]).double().unsqueeze(-1)
    y = file["x"].double() @ (codes * scales + zeros).flatten(1).T + file["packed.bias"].double()
    # The golden output was summed in float32: 1e-5 of the largest term, K = 1024 terms at most.
    torch.testing.assert_close(y.float(), file["y_f32"], rtol=1e-4, atol=1e-4)
