"""`quantization.share_branches`: whether q, k and v have one down projection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from svdq_cli.checkpoint.reader import open_checkpoint
from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.entrypoints.export import export
from svdq_cli.errors import UsageError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Quantization, default_recipe, with_overrides
from svdq_cli.records import W4A4Solution
from svdq_cli.reports import ConvertReport

CPU = RunOptions(device="cpu")
QKV = tuple(f"transformer_blocks.0.attn.to_{each}" for each in "qkv")


def converted(source: Path, out: Path, share: bool | str, *formats: str) -> ConvertReport:
    quantization = {"rank": 16, "effort": "datafree", "share_branches": share}
    paths = tuple(out.with_name(f"{out.name}.{name}") for name in formats)
    outputs = [
        Output.model_validate({"format": name, "path": str(path)})
        for name, path in zip(formats, paths, strict=True)
    ]
    recipe = default_recipe(
        str(source), quantization=Quantization.model_validate(quantization), outputs=outputs
    )
    return convert(recipe, paths, options=CPU)


def downs(report: ConvertReport) -> list[Tensor]:
    checkpoint = open_checkpoint(Path(report.outputs[0].path))
    solutions = [checkpoint.solution(checkpoint.by_name[name]) for name in QKV]
    return [each.down for each in solutions if isinstance(each, W4A4Solution)]


def all_same(tensors: list[Tensor]) -> bool:
    assert len(tensors) == len(QKV)
    return all(torch.equal(each, tensors[0]) for each in tensors)


def test_branches_of_their_own_are_nearer_at_the_same_bytes_and_can_not_be_fused(
    tiny_flux: Path, tmp_path: Path
):
    shared = converted(tiny_flux, tmp_path / "shared", True, "nunchaku-lite")
    own = converted(tiny_flux, tmp_path / "own", False, "nunchaku-lite")
    assert all_same(downs(shared))
    assert not all_same(downs(own))
    weights = [
        Path(report.outputs[0].path, "transformer", "diffusion_pytorch_model.safetensors").stat().st_size
        for report in (shared, own)
    ]
    assert abs(weights[0] - weights[1]) < 1024  # the headers' text
    for name in QKV:
        assert own.layer_sqnr_db.per_layer[name] > shared.layer_sqnr_db.per_layer[name]
    with pytest.raises(UsageError, match="low-rank down projections differ") as refusal:
        export(Path(own.outputs[0].path), "nunchaku", tmp_path / "out.safetensors")
    assert "without share_branches: false" in str(refusal.value.hint)


def test_own_branches_are_refused_before_the_work_where_an_output_stacks_them(
    tiny_flux: Path, tmp_path: Path
):
    with pytest.raises(UsageError, match=r"to_q and .*to_k as one matrix, but share_branches is false"):
        converted(tiny_flux, tmp_path / "both", False, "nunchaku-lite", "nunchaku")
    assert list(tmp_path.iterdir()) == []


RULES = {
    "group": [{"match": "transformer_blocks.*.attn", "group": ["to_k", "to_v"]}],
    "include": [
        {"match": "transformer_blocks.0.attn.to_k", "include": "w4a16"},
        {"match": "transformer_blocks.0.attn.to_k", "include": "w4a4"},
    ],
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    ("fmt", "precision"), [("nunchaku", "int4"), ("comfy", "int4"), ("comfy-core", "nvfp4")]
)
def test_layers_of_one_matrix_that_a_rule_solves_apart_are_refused_by_the_plan(
    tiny_flux: Path, rules: list[dict[str, object]], fmt: str, precision: str
):
    recipe = with_overrides(
        default_recipe(str(tiny_flux)),
        {"layers": rules, "outputs": [{"format": fmt}], "quantization.precision": precision},
    )
    with pytest.raises(
        UsageError, match=r"to_q and .*to_k as one matrix, but a rule under layers"
    ) as refusal:
        predict(recipe, options=RunOptions(device="cpu"))
    assert "nunchaku-lite" in str(refusal.value.hint)
    alone = with_overrides(recipe, {"outputs": [{"format": "nunchaku-lite"}]})
    assert predict(alone, options=RunOptions(device="cpu")).status == "planned"


def test_auto_shares_where_an_output_stores_them_as_one_module(tiny_flux: Path, tmp_path: Path):
    assert not all_same(downs(converted(tiny_flux, tmp_path / "alone", "auto", "nunchaku-lite")))
    both = converted(tiny_flux, tmp_path / "both", "auto", "nunchaku-lite", "nunchaku")
    assert all_same(downs(both))
