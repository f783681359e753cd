"""Export packs the same bits for another runtime, or says why it can't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdq_cli.checkpoint.check import check
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.cli import run
from svdq_cli.conversion.convert import convert
from svdq_cli.entrypoints.export import export
from svdq_cli.errors import InputError, UsageError
from svdq_cli.inference.load import load_pipeline
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Quantization, default_recipe, with_overrides
from svdq_cli.records import W4A4Solution, W4A16Solution
from svdq_cli.runtime.linear import w4a16_rounded_weight
from svdq_cli.source import open_source

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def converted_alone(
    source: Path,
    out: Path,
    name: str,
    precision: str,
    *,
    layers: Sequence[Mapping[str, object]] = (),
    modulation: str = "auto",
) -> Path:
    recipe = default_recipe(
        str(source),
        quantization=Quantization.model_validate({"precision": precision, "rank": 16, "effort": "datafree"}),
        outputs=[Output.model_validate({"format": name, "path": str(out)})],
    )
    recipe = with_overrides(recipe, {"layers": layers, "modulation": modulation})
    convert(recipe, out, options=RunOptions(device="cpu"))
    return out


def same_but_provenance(a: Path, b: Path) -> bool:
    """Tensors byte for byte, and the header but for what it says of the making."""
    with safe_open(a, framework="pt") as first, safe_open(b, framework="pt") as second:
        headers = [
            {k: v for k, v in file.metadata().items() if k not in ("svdq", "config")}
            for file in (first, second)
        ]
        if list(first.keys()) != list(second.keys()) or headers[0] != headers[1]:
            return False
        return all(
            torch.equal(
                first.get_tensor(key).contiguous().flatten().view(torch.uint8),
                second.get_tensor(key).contiguous().flatten().view(torch.uint8),
            )
            for key in first.keys()  # noqa: SIM118  # safe_open is no mapping
        )


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_lite_to_classic_is_the_file_that_convert_writes(
    converted_flux: Callable[[str], Path], tmp_path: Path, precision: str
):
    folder = converted_flux(precision)
    report = export(folder / "lite", "nunchaku", tmp_path / "out.safetensors")
    assert report.source_format == "nunchaku-lite"
    assert report.warnings == ()
    assert same_but_provenance(tmp_path / "out.safetensors", folder / "nunchaku.safetensors")


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_classic_to_lite_with_a_base_is_the_pipeline_that_convert_writes(
    converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path, precision: str
):
    folder = converted_flux(precision)
    export(folder / "nunchaku.safetensors", "nunchaku-lite", tmp_path / "out", base=tiny_flux)
    assert same_but_provenance(tmp_path / "out" / WEIGHTS, folder / "lite" / WEIGHTS)
    assert load_pipeline(tmp_path / "out", device="cpu") is not None
    assert check(tmp_path / "out", against=open_source(tiny_flux)).status == "ok"


def test_without_a_base_lite_is_the_component_alone_and_the_report_says_so(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    report = export(converted_flux("int4") / "nunchaku.safetensors", "nunchaku-lite", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert "--base" in report.warnings[0]
    assert open_checkpoint(tmp_path / "out").format.name == "nunchaku-lite"


def test_comfy_to_classic_and_back_is_the_same_file(converted_flux: Callable[[str], Path], tmp_path: Path):
    """Modulations too: their zeros count from the middle code in one, from code 0 in the other."""
    folder = converted_flux("int4")
    export(folder / "comfy.safetensors", "nunchaku", tmp_path / "classic.safetensors")
    export(tmp_path / "classic.safetensors", "comfy", tmp_path / "comfy.safetensors")
    assert same_but_provenance(tmp_path / "classic.safetensors", folder / "nunchaku.safetensors")
    assert same_but_provenance(tmp_path / "comfy.safetensors", folder / "comfy.safetensors")


def test_a_modulation_that_the_target_keeps_is_written_as_its_kernel_computes_it(tmp_path: Path):
    from tests.tiny_families import tiny_pipeline

    source = tiny_pipeline("z-image", tmp_path / "z-image") / "transformer"
    name = "layers.0.adaLN_modulation.0"
    rule = {"match": name, "include": "w4a16"}
    converted = converted_alone(source, tmp_path / "lite", "nunchaku-lite", "int4", layers=[rule])
    before = open_checkpoint(converted)
    report = export(before.source.path, "nunchaku", tmp_path / "out.safetensors")
    assert "1 W4A16 layers are written at 16 bits" in report.warnings[0]
    after = open_checkpoint(tmp_path / "out.safetensors")
    solution = before.solution(next(layer for layer in before.layers if layer.name == name))
    assert isinstance(solution, W4A16Solution)
    assert torch.equal(after.kept_tensor(f"{name}.weight").float(), w4a16_rounded_weight(solution))
    assert all(layer.name in {plan.name for plan in before.layers} for layer in after.layers)


@pytest.mark.parametrize(
    ("source", "precision", "to", "said"),
    [
        ("nunchaku.safetensors", "nvfp4", "comfy", "comfy stores int4, not nvfp4"),
        ("nunchaku.safetensors", "int4", "vllm-omni", "vllm-omni stores nvfp4, not int4"),
        ("nunchaku.safetensors", "nvfp4", "vllm-omni", "no layout for the model family 'flux'"),
        ("nunchaku.safetensors", "int4", "nunchaku", "is already a nunchaku checkpoint"),
        ("lite", "int4", "gguf", "unknown format 'gguf'"),
    ],
)
def test_what_the_target_cannot_say_is_refused_in_words(
    converted_flux: Callable[[str], Path], tmp_path: Path, source: str, precision: str, to: str, said: str
):
    with pytest.raises(UsageError, match=said):
        export(converted_flux(precision) / source, to, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_modulations_that_stay_at_16_bits_have_no_place_in_classic_files(tiny_flux: Path, tmp_path: Path):
    path = tmp_path / "comfy.safetensors"
    converted_alone(tiny_flux, path, "comfy", "int4", modulation="keep")
    kept = open_checkpoint(path).kept_names()
    assert "transformer_blocks.0.norm1.linear.weight" in kept
    with pytest.raises(UsageError, match=r"stores transformer_blocks\.0\.norm1\.linear in 4 bits"):
        export(path, "nunchaku", tmp_path / "out.safetensors")


def test_layers_with_a_branch_and_rotated_ones_are_not_exported_to_one_another(
    converted_flux: Callable[[str], Path], tiny_flux: Path, tmp_path: Path
):
    core = converted_alone(tiny_flux, tmp_path / "core.safetensors", "comfy-core", "int4")
    for path, to in (
        (core, "nunchaku-lite"),
        (core, "nunchaku"),
        (converted_flux("int4") / "lite", "comfy-core"),
    ):
        with pytest.raises(UsageError, match="no low-rank branch, so nothing can be exported") as refused:
            export(path, to, tmp_path / "out")
        assert refused.value.hint == f"convert the model from its source with --format {to}"
    assert not (tmp_path / "out").exists()


def test_a_shift_that_the_header_does_not_record_is_refused(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    """As in files of other tools: the rounded sum is all there is."""
    path = converted_flux("int4") / "nunchaku.safetensors"
    with safe_open(path, framework="pt") as file:
        header = {key: text for key, text in file.metadata().items() if key != "svdq_biases"}
    save_file(load_file(path), tmp_path / "foreign.safetensors", metadata=header)
    with pytest.raises(UsageError, match="shifted for the runtime"):
        export(tmp_path / "foreign.safetensors", "nunchaku-lite", tmp_path / "out")


def test_layers_that_were_not_solved_together_cannot_be_stacked(
    converted_flux: Callable[[str], Path], tmp_path: Path
):
    shutil.copytree(converted_flux("int4") / "lite", tmp_path / "lite")
    weights = tmp_path / "lite" / WEIGHTS
    tensors = load_file(weights)
    tensors["transformer_blocks.0.attn.to_k.smooth_factor"] *= 2
    save_file(tensors, weights)
    with pytest.raises(UsageError, match=r"attn\.to_q and .*attn\.to_k as one matrix, but their smoothing"):
        export(tmp_path / "lite", "nunchaku", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lite"]


def test_a_damaged_checkpoint_is_not_exported(converted_flux: Callable[[str], Path], tmp_path: Path):
    shutil.copytree(converted_flux("int4") / "lite", tmp_path / "lite")
    weights = tmp_path / "lite" / WEIGHTS
    tensors = load_file(weights)
    del tensors["proj_out.weight"]
    save_file(tensors, weights)
    with pytest.raises(InputError, match=r"proj_out\.weight: is missing"):
        export(tmp_path / "lite", "nunchaku", tmp_path / "out.safetensors")


def test_the_command_reports_json_and_its_exit_codes(
    converted_flux: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = converted_flux("int4") / "lite"
    assert run(f"export {source} --to comfy -o {tmp_path}/a.safetensors --json -q".split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["command"], report["status"], report["outputs"][0]["format"]) == ("export", "ok", "comfy")
    assert run(f"export {source} --to comfy -o {tmp_path}/a.safetensors --json -q".split()) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "output-exists"
    assert run(f"export {tmp_path} --to comfy -o {tmp_path}/b.safetensors --json -q".split()) == 3


def test_a_padded_matrix_becomes_the_size_it_was(tmp_path: Path):
    """SANA's engine reads padded tiles; the layers come back at the model's own sizes."""
    from tests.tiny_families import tiny_pipeline

    source = tiny_pipeline("sana", tmp_path / "sana") / "transformer"
    path = converted_alone(source, tmp_path / "sana.safetensors", "nunchaku", "int4")
    checkpoint = open_checkpoint(path)
    for layer in checkpoint.layers:
        solution = checkpoint.solution(layer)
        assert isinstance(solution, W4A4Solution)
        assert solution.codes.shape == (layer.linear.out_features, layer.linear.in_features)
    with pytest.raises(UsageError, match="can't hold this 4-bit layer"):
        export(path, "nunchaku-lite", tmp_path / "out")
