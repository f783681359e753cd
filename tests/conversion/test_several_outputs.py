"""One conversion, several files: one search, all of them whole and checked, or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from svdq_cli.calibration.artefact import open_calibration
from svdq_cli.cli import run
from svdq_cli.conversion import solve_layers
from svdq_cli.conversion.calibrate import calibrate
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import CheckFailedError, UsageError
from svdq_cli.prepare.from_command_line import outputs_of, override
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Calibration, Output, Quantization, Recipe, default_recipe, load_recipe
from svdq_cli.storage.tensor_file import TensorWriter

CPU = RunOptions(device="cpu")


def recipe_for(source: Path, *outputs: tuple[str, Path]) -> Recipe:
    return default_recipe(
        str(source),
        quantization=Quantization.model_validate({"rank": 16, "effort": "datafree"}),
        outputs=[Output.model_validate({"format": name, "path": str(path)}) for name, path in outputs],
    )


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_command_line_names_several_formats_after_one_output(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = f"convert {tiny_flux} -o {tmp_path}/out --format nunchaku-lite --format nunchaku --format comfy"
    assert run(f"{words} --effort datafree --rank 16 --device cpu --json -q".split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert [output["format"] for output in report["outputs"]] == ["nunchaku-lite", "nunchaku", "comfy"]
    assert leftovers(tmp_path) == [
        "out",
        "out.comfy.safetensors",
        "out.comfy.safetensors.README.md",
        "out.comfy.safetensors.report.json",
        "out.nunchaku.safetensors",
        "out.nunchaku.safetensors.README.md",
        "out.nunchaku.safetensors.report.json",
    ]
    beside = json.loads((tmp_path / "out.comfy.safetensors.report.json").read_text())
    assert beside == json.loads((tmp_path / "out" / "svdq_report.json").read_text()) == report
    for output in report["outputs"]:
        assert Path(output["path"]).exists()
        assert run(f"check {output['path']} --against {tiny_flux} -q".split()) == 0


def test_the_layers_are_solved_once(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    solve = solve_layers.solve_input

    def counted(shared, *args, **kwargs):
        calls.append(shared.layers[0])
        return solve(shared, *args, **kwargs)

    monkeypatch.setattr(solve_layers, "solve_input", counted)
    paths = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    convert(recipe_for(tiny_flux, ("nunchaku", paths[0]), ("comfy", paths[1])), paths, options=CPU)
    assert len(calls) == len(set(calls))


def test_one_bad_output_leaves_none(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write = TensorWriter.write

    def scrambled(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        if name == "double_blocks.0.img_attn.proj.weight":
            tensor = tensor.flatten().roll(64).reshape(tensor.shape)
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", scrambled)
    paths = (tmp_path / "lite", tmp_path / "b.safetensors")
    with pytest.raises(CheckFailedError, match=r"transformer_blocks\.0\.attn\.to_out\.0"):
        convert(recipe_for(tiny_flux, ("nunchaku-lite", paths[0]), ("comfy", paths[1])), paths, options=CPU)
    assert leftovers(tmp_path) == []


def test_an_output_that_exists_stops_all_before_the_work(tiny_flux: Path, tmp_path: Path):
    paths = (tmp_path / "lite", tmp_path / "b.safetensors")
    paths[1].write_text("mine")
    with pytest.raises(UsageError, match="already exists"):
        convert(recipe_for(tiny_flux, ("nunchaku-lite", paths[0]), ("comfy", paths[1])), paths, options=CPU)
    assert leftovers(tmp_path) == ["b.safetensors"]
    assert paths[1].read_text() == "mine"


def test_the_same_file_is_written_twice_byte_for_byte(tiny_flux: Path, tmp_path: Path):
    alone, among = tmp_path / "alone.safetensors", tmp_path / "among.safetensors"
    convert(recipe_for(tiny_flux, ("nunchaku", alone)), alone, options=CPU)
    paths = (tmp_path / "lite", among)
    convert(recipe_for(tiny_flux, ("nunchaku-lite", paths[0]), ("nunchaku", among)), paths, options=CPU)
    assert alone.read_bytes() == among.read_bytes()


def test_options_over_outputs():
    plain = default_recipe("model")
    assert [str(path) for path in outputs_of(override(plain, {"outputs.path": Path("x")}))] == ["x"]
    chosen = override(plain, {"outputs.path": Path("x"), "outputs.format": ["nunchaku", "comfy"]})
    assert [str(path) for path in outputs_of(chosen)] == ["x.nunchaku.safetensors", "x.comfy.safetensors"]
    with pytest.raises(UsageError, match="twice"):
        override(plain, {"outputs.path": Path("x"), "outputs.format": ["comfy", "comfy"]})
    two = recipe_for(Path("model"), ("nunchaku-lite", Path("a")), ("comfy", Path("b")))
    assert len(outputs_of(override(two, {}))) == 2
    with pytest.raises(UsageError, match="names 2 outputs"):
        override(two, {"outputs.path": Path("x")})
    with pytest.raises(UsageError, match="no output is named"):
        outputs_of(override(plain, {"outputs.format": ["comfy"]}))


def recipe_with(folder: Path, outputs: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(f"version: 1\nmodel: {{source: model}}\noutputs: {outputs}\n")
    return load_recipe(path)


def test_a_recipe_may_leave_its_outputs_path_to_the_command(tmp_path: Path):
    recipe = recipe_with(tmp_path, "[{format: comfy}]")
    said = override(recipe, {"outputs.path": Path("x.safetensors")})
    assert [(output.format, output.path) for output in said.outputs] == [("comfy", "x.safetensors")]
    with pytest.raises(UsageError, match="no output is named") as refused:
        outputs_of(recipe)
    assert "-o OUT" in str(refused.value.hint)


def test_of_several_outputs_the_one_without_a_path_is_named(tmp_path: Path):
    recipe = recipe_with(tmp_path, "[{path: a}, {format: nunchaku}, {format: comfy}]")
    with pytest.raises(UsageError, match=r"outputs\[1\] \(nunchaku\) has no path"):
        outputs_of(recipe)


def test_a_calibration_serves_formats_that_quantize_more_than_the_default_one(tmp_path: Path):
    """SANA's 1x1 convolutions have a place in Nunchaku's files and none in Lite's."""
    from tests.tiny_families import tiny_pipeline

    source = tiny_pipeline("sana", tmp_path / "sana")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    calibration = Calibration(
        prompts=str(tmp_path / "prompts.txt"), samples=1, steps=1, height=32, width=32, rows=64
    )
    recipe = default_recipe(
        str(source),
        calibration=calibration,
        quantization=Quantization.model_validate({"rank": 16, "smoothing": "closed-form"}),
        outputs=[Output.model_validate({"format": "nunchaku", "path": "x"})],
    )
    default = recipe.model_copy(update={"outputs": ()})
    calibrate(default, tmp_path / "calib", options=CPU)
    assert "transformer_blocks.0.ff.conv_inverted" in open_calibration(tmp_path / "calib").names
    out = tmp_path / "sana.safetensors"
    report = convert(recipe, out, calibration=tmp_path / "calib", options=CPU)
    assert report.layer_sqnr_db.per_layer["transformer_blocks.0.ff.conv_inverted"] > 10
