"""What a runtime tells variants of a model by is written, kept and looked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.checkpoint.check import check, find_problems
from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.entrypoints.export import export
from svdq_cli.lora.fold import fold
from svdq_cli.recipe import Output, default_recipe, with_overrides
from svdq_cli.source import open_source
from svdq_cli.storage.headers import header_metadata
from tests.tiny_families import tiny_pipeline

MARKER = "__index_timestep_zero__"  # by which ComfyUI tells Qwen-Image-Edit 2511


def comfy_file(source: Path, out: Path) -> Path:
    recipe = default_recipe(str(source), outputs=[Output(format="comfy", path=str(out))])
    convert(with_overrides(recipe, {"quantization.effort": "datafree", "quantization.rank": 16}), out)
    return out


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("qwen-image-edit", tmp_path_factory.mktemp("edit") / "edit")


@pytest.fixture(scope="module")
def file(edit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfy_file(edit, tmp_path_factory.mktemp("comfy") / "edit.safetensors")


def test_comfyui_is_told_what_the_config_says(edit: Path, file: Path):
    assert load_file(file)[MARKER].numel() == 0
    assert check(file, against=open_source(edit)).status == "ok"


def test_another_variant_of_the_same_class_has_no_marker(tmp_path: Path):
    plain = tiny_pipeline("qwen-image", tmp_path / "qwen")
    assert MARKER not in load_file(comfy_file(plain, tmp_path / "plain.safetensors"))


def test_it_is_written_where_a_folder_is_exported_and_is_no_layer_there(
    edit: Path, file: Path, tmp_path: Path
):
    export(file, "nunchaku-lite", tmp_path / "lite", base=edit)
    (weights,) = (tmp_path / "lite/transformer").glob("*.safetensors")
    assert MARKER not in load_file(weights)
    export(tmp_path / "lite", "comfy", tmp_path / "again.safetensors")
    assert MARKER in load_file(tmp_path / "again.safetensors")


def test_a_file_without_it_fails_the_check(file: Path, tmp_path: Path):
    state = load_file(file)
    del state[MARKER]
    save_file(state, tmp_path / "bare.safetensors", header_metadata(file))
    (problem,) = find_problems(open_checkpoint(tmp_path / "bare.safetensors"))
    assert (problem.layer, "recognize this variant" in problem.what) == (MARKER, True)


def test_another_tool_s_spelling_of_it_passes(file: Path, tmp_path: Path):
    """ComfyUI's own files have numbers of other shapes there, which it never reads."""
    state = {**load_file(file), MARKER: torch.zeros(())}
    save_file(state, tmp_path / "scalar.safetensors", header_metadata(file))
    assert find_problems(open_checkpoint(tmp_path / "scalar.safetensors")) == []


def test_it_stays_where_a_lora_is_folded_in(file: Path, tmp_path: Path):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    plan = next(
        plan for plan in open_checkpoint(file).layers if plan.name == layer.removeprefix("transformer.")
    )
    lora = {
        f"{layer}.lora_A.weight": torch.ones(4, plan.linear.in_features),
        f"{layer}.lora_B.weight": torch.ones(plan.linear.out_features, 4),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    fold(file, [LoraFile(tmp_path / "lora.safetensors", 0.5)], tmp_path / "folded.safetensors")
    assert MARKER in load_file(tmp_path / "folded.safetensors")
