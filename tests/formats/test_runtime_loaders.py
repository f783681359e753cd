"""The rules by which other runtimes load files, as facts of pinned versions, and files of svdq put to them.

`make runtimes` runs the loaders themselves.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from svdq_cli.conversion.convert import convert
from svdq_cli.families.layouts import LAYOUTS
from svdq_cli.formats import format_named
from svdq_cli.formats.nunchaku import sglang_name
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare, warnings_of
from svdq_cli.recipe import Output, Quantization, Recipe, default_recipe
from tests.tiny_families import tiny_pipeline

# vLLM-Omni 0.30.0, load_weights of its models: the first rule whose second part is in a name replaces it by its first,
# and the parameter's loader is called with a shard.
OMNI_RULES = {
    "z-image": (
        (".to_qkv.", ".to_q."),
        (".to_qkv.", ".to_k."),
        (".to_qkv.", ".to_v."),
        (".w13", ".w1"),
        (".w13", ".w3"),
    )
}
# ... the linears that it gives to the quantization, and their parameters, of which the loader of one takes no shard
OMNI_LINEARS = ("attention.to_qkv", "attention.to_out.0", "feed_forward.w13", "feed_forward.w2")
OMNI_PARAMETERS = {"qweight", "wscales", "proj_down", "proj_up", "smooth_factor", "wcscales", "wtscale"}
OMNI_TAKES_NO_SHARD = "wtscale"
# Nunchaku 1.2.0, models/unets/unet_sdxl.py: the first of these that is in a name is replaced
SDXL_RULES = (
    (".lora_down", ".proj_down"),
    (".lora_up", ".proj_up"),
    (".smooth_orig", ".smooth_factor_orig"),
    (".smooth", ".smooth_factor"),
)
# ... and the parameters of its W4A4 linear
NUNCHAKU_PARAMETERS = {"qweight", "wscales", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up"}
# SGLang 0.5.23: what it looks for in a file's name
SGLANG_NAME = re.compile(r"svdq-(int4|fp4)_r(\d+)")


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("z-image", tmp_path_factory.mktemp("z-image") / "z-image") / "transformer"


def recipe_for(model: Path, out: Path, name: str, precision: str, rank: int = 32) -> Recipe:
    return default_recipe(
        str(model),
        quantization=Quantization.model_validate(
            {"precision": precision, "rank": rank, "effort": "datafree"}
        ),
        outputs=[Output.model_validate({"format": name, "path": str(out)})],
    )


def test_the_rules_of_every_family_for_vllm_omni_are_here():
    assert {layout.family for layout in LAYOUTS if layout.format == "vllm-omni"} == OMNI_RULES.keys()


def test_vllm_omnis_loader_finds_a_parameter_for_every_tensor_and_a_tensor_for_every_parameter(
    z_image: Path, tmp_path: Path
):
    out = tmp_path / "out.safetensors"
    convert(recipe_for(z_image, out, "vllm-omni", "nvfp4"), (out,), options=RunOptions(device="cpu"))
    with safe_open(out, "pt") as file:
        names = list(file.keys())
        kept = json.loads(file.metadata()["quantization_config"])["modules_to_not_convert"]
    found: dict[str, set[str]] = {}
    for name in names:
        rule = next((rule for rule in OMNI_RULES["z-image"] if rule[1] in name), None)
        module, _, parameter = (name.replace(rule[1], rule[0]) if rule else name).rpartition(".")
        assert rule is None or parameter != OMNI_TAKES_NO_SHARD
        found.setdefault(module, set()).add(parameter)
    for block in ("noise_refiner.0", "context_refiner.0", "layers.0"):
        for linear in OMNI_LINEARS:
            module = f"{block}.{linear}"
            skipped = any(name in module for name in kept)
            assert found.pop(module) == ({"weight"} if skipped else OMNI_PARAMETERS), module
    # what is left is no module that the quantization changes
    assert {parameter for parameters in found.values() for parameter in parameters}.isdisjoint(
        OMNI_PARAMETERS
    )


def test_only_ranks_that_fused_kernels_take_pass_without_a_warning_for_vllm_omni(z_image: Path):
    def said(rank: int) -> list[str]:
        prepared = prepare(recipe_for(z_image, Path("out.safetensors"), "vllm-omni", "nvfp4", rank))
        return [text for text in warnings_of(prepared, data_free=False) if "FlashInfer" in text]

    assert said(32) == said(64) == []
    (warning,) = said(48)
    assert warning.startswith("rank 48: FlashInfer's fused nvfp4 kernels take multiples of 32")


def test_layers_without_a_module_in_the_output_are_named_with_the_reason(z_image: Path):
    prepared = prepare(recipe_for(z_image, Path("out.safetensors"), "vllm-omni", "nvfp4"))
    assert "layers.0.feed_forward.w1" in {linear.name for linear in prepared.plan.kept}
    (warning,) = [text for text in warnings_of(prepared, data_free=False) if "feed_forward.w1" in text]
    assert warning.endswith("vllm-omni has no 4-bit module for them")


@pytest.mark.parametrize(
    ("name", "precision", "rank", "proposed"),
    [
        ("z.safetensors", "int4", 32, "svdq-int4_r32-z.safetensors"),
        ("z.safetensors", "nvfp4", 128, "svdq-fp4_r128-z.safetensors"),
        ("svdq-fp4_r128-z.safetensors", "nvfp4", 128, "svdq-fp4_r128-z.safetensors"),
        ("svdq-int4_r320-z.safetensors", "int4", 32, "svdq-int4_r32-svdq-int4_r320-z.safetensors"),
    ],
)
def test_sglang_reads_precision_and_rank_from_the_proposed_name(
    name: str, precision: str, rank: int, proposed: str
):
    assert sglang_name(name, precision, rank) == proposed
    match = SGLANG_NAME.search(proposed)
    assert match is not None
    assert match.groups() == ("fp4" if precision == "nvfp4" else precision, str(rank))


def test_only_where_sglang_loads_the_family_a_name_is_proposed():
    nunchaku = format_named("nunchaku")
    said = nunchaku.naming("z.safetensors", "z-image", "int4", 32)
    assert (
        said == "in SGLang: name the file svdq-int4_r32-z.safetensors, by which it knows precision and rank"
    )
    assert nunchaku.naming("svdq-int4_r32-z.safetensors", "z-image", "int4", 32) is None
    assert nunchaku.naming("f.safetensors", "flux", "int4", 32) is None
    assert format_named("comfy").naming("z.safetensors", "z-image", "int4", 32) is None


def test_a_file_for_sglang_names_the_class_that_it_serves(z_image: Path, tmp_path: Path):
    out = tmp_path / "out.safetensors"
    convert(recipe_for(z_image, out, "nunchaku", "int4"), (out,), options=RunOptions(device="cpu"))
    with safe_open(out, "pt") as file:
        config = json.loads(file.metadata()["config"])
        # its default rank, where the name says none
        assert file.get_slice("layers.0.attention.to_qkv.proj_down").get_shape()[1] == 32
        assert file.get_tensor("layers.0.attention.to_qkv.smooth_factor_orig").dtype == torch.bfloat16
    assert config["_class_name"] == "ZImageTransformer2DModel"


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_nunchakus_loader_of_sdxl_renames_tensors_to_the_parameters_of_its_linear(
    precision: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
):
    unet = tiny_pipeline("sdxl", tmp_path_factory.mktemp("sdxl") / "sdxl") / "unet"
    out = tmp_path / "out.safetensors"
    convert(recipe_for(unet, out, "nunchaku", precision), (out,), options=RunOptions(device="cpu"))
    found: dict[str, set[str]] = {}
    with safe_open(out, "pt") as file:
        names = list(file.keys())
    for name in names:
        rule = next((rule for rule in SDXL_RULES if ".transformer_blocks." in name and rule[0] in name), None)
        module, _, parameter = (name.replace(*rule) if rule else name).rpartition(".")
        found.setdefault(module, set()).add(parameter)
    quantized = {module: parameters for module, parameters in found.items() if "qweight" in parameters}
    expected = NUNCHAKU_PARAMETERS | ({"wcscales"} if precision == "nvfp4" else set())
    assert quantized
    assert {module for module, parameters in quantized.items() if parameters - {"bias"} != expected} == set()


def test_the_page_says_of_every_runtime_what_the_tool_saw():
    from tools.runtimes import CASES, NUNCHAKU_CASES

    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| `")
    ]
    names = {
        "vllm_omni": "vLLM-Omni 0.30.0",
        "sglang": "SGLang 0.5.23",
        "nunchaku": "Nunchaku 1.2.0 (Python classes)",
    }
    for case in (*CASES, *NUNCHAKU_CASES):
        said = [
            row[3]
            for row in rows
            if row[0] == f"`{case.format}`"
            and row[2] == names[case.runtime]
            and case.family in row[1].split(", ")
        ]
        assert [text.startswith("yes" if case.loads else "no") for text in said] == [True], case
