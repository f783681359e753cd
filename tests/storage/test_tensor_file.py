"""The streamed writer against safetensors' own."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.storage.tensor_file import TensorSpec, bytes_of, save_tensors, write_tensors

TENSORS = {
    "b.weight": torch.randn(3, 5).bfloat16(),
    "a.codes": torch.arange(6, dtype=torch.int8).reshape(2, 3),
    "a.words": torch.arange(4, dtype=torch.int32),
    "z.scales": torch.randn(7).to(torch.float8_e4m3fn),
    "z.outer": torch.ones(1, dtype=torch.float16),
    "scalar": torch.tensor(2.0),
    "text": torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8),
    "größe": torch.zeros(2, 0, dtype=torch.int64),
}
SPECS = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_the_bytes_are_those_of_safetensors_whatever_the_order_of_writing(tmp_path: Path):
    metadata = {"format": 'p"t\n', "name": "Größe"}
    save_file(TENSORS, tmp_path / "theirs", metadata=metadata)
    with write_tensors(tmp_path / "ours", SPECS, metadata) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    length = int.from_bytes(theirs[:8], "little")
    assert ours[:8] == theirs[:8]
    # safetensors keeps metadata in a hash map, whose order changes from run to run
    assert json.loads(ours[8 : 8 + length]) == json.loads(theirs[8 : 8 + length])
    assert ours[8 + length :] == theirs[8 + length :]
    for name, tensor in load_file(tmp_path / "ours").items():
        assert torch.equal(bytes_of(tensor), bytes_of(TENSORS[name])), name


def test_one_entry_of_metadata_gives_the_very_same_file(tmp_path: Path):
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    with write_tensors(tmp_path / "ours", SPECS, {"format": "pt"}) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_must_be_what_the_header_announces(tmp_path: Path):
    for name, tensor in (("b.weight", torch.zeros(5, 3).bfloat16()), ("stranger", torch.zeros(1))):
        with pytest.raises(ValueError, match=name), write_tensors(tmp_path / "file", SPECS, {}) as writer:
            writer.write(name, tensor)
    with write_tensors(tmp_path / "file", {"scalar": SPECS["scalar"]}, {}) as writer:
        writer.write("scalar", TENSORS["scalar"])
        with pytest.raises(ValueError, match="twice"):
            writer.write("scalar", TENSORS["scalar"])


def test_a_file_with_a_hole_is_an_error(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="7 tensors were not written"),
        write_tensors(tmp_path / "file", SPECS, {}) as writer,
    ):
        writer.write("scalar", TENSORS["scalar"])


def test_saved_tensors_are_safetensors_own_and_readable_as_the_umask_says(tmp_path: Path):
    tensors = {
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        "a": torch.ones(3, dtype=torch.int8),
    }
    before = os.umask(0o022)
    try:
        save_tensors(tmp_path / "file.safetensors", tensors, {"format": "pt"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.safetensors").stat().st_mode) == 0o644
    found = load_file(tmp_path / "file.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
