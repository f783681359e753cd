"""`svdq check` tells weight files that are not what the report beside them was written for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdq_cli.checkpoint import writer
from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.recipe import default_recipe, with_overrides
from svdq_cli.source.folders import weight_files

FILE = "out.comfy.safetensors"


@pytest.fixture(scope="module")
def made(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one output that is a folder of several shards, and one that is a file."""
    folder = tmp_path_factory.mktemp("made")
    outputs = [
        {"format": "nunchaku-lite", "path": str(folder / "out")},
        {"format": "comfy", "path": str(folder / FILE)},
    ]
    settings = {"quantization.effort": "datafree", "quantization.rank": 16, "outputs": outputs}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 20_000)
        convert(with_overrides(default_recipe(str(tiny_flux)), settings), (folder / "out", folder / FILE))
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def turn_a_bit(file: Path) -> None:
    """The lowest one of the largest tensor: it becomes no infinite value, and no other structure."""
    data = bytearray(file.read_bytes())
    begins = 8 + int.from_bytes(data[:8], "little")
    header = {key: value for key, value in json.loads(data[8:begins]).items() if key != "__metadata__"}
    spans = [value["data_offsets"] for value in header.values()]
    data[begins + max(spans, key=lambda span: span[1] - span[0])[0]] ^= 1
    file.write_bytes(data)


def test_what_was_written_is_whole(copy: Path):
    assert len(weight_files(copy / "out" / "transformer")) > 1
    assert check(copy / "out").status == "ok"
    assert check(copy / FILE).status == "ok"


@pytest.mark.parametrize("output", ["out", FILE])
def test_one_turned_bit_is_found_without_the_source(output: str, copy: Path):
    path = copy / output
    turn_a_bit(path if path.is_file() else weight_files(path / "transformer")[-1])
    (problem,) = check(path).problems
    assert "is not what the report beside it was written for (sha256 " in problem.what


@pytest.mark.parametrize("output", ["out", FILE])
def test_a_file_that_another_program_wrote_again_is_not_called_changed(output: str, copy: Path):
    path = copy / output
    files = [path] if path.is_file() else weight_files(path / "transformer")
    written = files[-1]
    with safe_open(written, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata() or {}
    before = written.read_bytes()
    save_file(tensors, written, metadata={**metadata, "tool": "another"})
    assert written.read_bytes() != before
    report = check(path)
    assert report.status == "ok"
    (said,) = report.warnings
    assert f"{files[0].name}: other bytes than the report beside it says, but the same tensors" in said
    turn_a_bit(written)
    (problem,) = check(path).problems
    assert "is not what the report beside it was written for (" in problem.what


def test_shards_that_were_put_together_are_the_same_tensors(copy: Path):
    folder = copy / "out" / "transformer"
    shards = weight_files(folder)
    tensors = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    for file in (*shards, *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    report = check(copy / "out")
    assert (report.status, len(report.warnings)) == ("ok", 1)


def test_a_file_of_another_size_is_said_to_be_one(copy: Path):
    report = copy / f"{FILE}.report.json"
    said = json.loads(report.read_text())
    for output in said["outputs"]:
        output |= {"bytes": 1, "sha256": "0" * 64, "tensors_sha256": "0" * 64}
    report.write_text(json.dumps(said))
    (problem,) = check(copy / FILE).problems
    assert "bytes instead of 1)" in problem.what


@pytest.mark.parametrize("text", [None, "{", "{}", '{"outputs": 3}', '{"outputs": [{"format": "nunchaku"}]}'])
def test_without_a_report_of_it_nothing_is_compared(text: str | None, copy: Path):
    turn_a_bit(copy / FILE)
    report = copy / f"{FILE}.report.json"
    if text is None:
        report.unlink()
    else:
        report.write_text(text)
    assert check(copy / FILE).status == "ok"
