"""The model card: the hub can read its header, the license of the source goes along, and it betrays no folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from svdq_cli.conversion.convert import convert
from svdq_cli.entrypoints.export import export
from svdq_cli.entrypoints.push import push
from svdq_cli.lora.fold import fold
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Recipe, default_recipe, parse_fail_if, with_overrides
from tests.adapters.test_loras import peft
from tests.lora.layers import FOUR_BIT, small_lora

CARD = """\
---
license: other
license_name: flux-1-dev-non-commercial-license
license_link: https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md
pipeline_tag: text-to-image
tags: [a, b]
---
The source's own words.
"""


def recipe_for(source: Path) -> Recipe:
    return with_overrides(
        default_recipe(str(source)), {"quantization.effort": "datafree", "quantization.rank": 16}
    )


def card_of(source: Path, out: Path) -> ModelCard:
    convert(recipe_for(source), out, options=RunOptions(device="cpu"))
    return ModelCard.load(out / "README.md")


def test_the_card_says_what_it_is_and_carries_the_license_over(tiny_flux_copy: Path, tmp_path: Path):
    (tiny_flux_copy / "README.md").write_text(CARD)
    card = card_of(tiny_flux_copy, tmp_path / "out")
    said = card.data.to_dict()
    assert said["license"] == "other"
    assert said["license_name"] == "flux-1-dev-non-commercial-license"
    assert said["license_link"].endswith("LICENSE.md")
    assert said["library_name"] == "diffusers"
    assert said["pipeline_tag"] == "text-to-image"
    assert {"svdquant", "int4", "nunchaku-lite"} <= set(said["tags"])
    assert "base_model" not in said  # a local folder has no name on the hub
    assert "The source's own words" not in card.content
    report = json.loads((tmp_path / "out/svdq_report.json").read_text())
    assert f"{report['bytes']['ratio']:.2f} times smaller" in card.content
    assert str(tmp_path) not in card.content
    assert "DiffusionPipeline.from_pretrained" in card.content


@pytest.mark.parametrize(
    "text",
    [
        "no header",
        "---\nlicense: [\n---\n",
        "---\nlicense: {a: 1}\n---\n",
        "---\nlicense: 'a\n\n  evil: b'\n---\n",
    ],
)
def test_a_card_that_says_no_license_gives_none(text: str, tiny_flux_copy: Path, tmp_path: Path):
    (tiny_flux_copy / "README.md").write_text(text)
    (tiny_flux_copy / "LICENSE.md").write_text("Everybody may.")
    said = card_of(tiny_flux_copy, tmp_path / "out").data.to_dict()
    assert (said["license"], said["license_link"]) == ("other", "LICENSE")
    assert (tmp_path / "out/LICENSE.md").is_file()


def test_a_file_has_its_card_beside_it_and_missed_gates_are_named(tiny_flux: Path, tmp_path: Path):
    out = tmp_path / "model.safetensors"
    recipe = recipe_for(tiny_flux).model_copy(
        update={
            "outputs": (Output(format="nunchaku", path=str(out)),),
            "gates": (parse_fail_if("size_ratio<50"), parse_fail_if("psnr_db<20")),
        }
    )
    convert(recipe, out, options=RunOptions(device="cpu"))
    text = (tmp_path / "model.safetensors.README.md").read_text()
    assert 'base="PIPELINE_FOLDER"' in text
    assert "missed: size\\_ratio &gt;= 50" in text
    assert "gate psnr\\_db &gt;= 20 | met, or left to svdq eval" in text


def test_the_same_conversion_has_the_same_card(tiny_flux: Path, tmp_path: Path):
    first, second = (card_of(tiny_flux, tmp_path / name) for name in ("a", "b"))
    assert first.content == second.content


def test_a_checkpoint_with_a_lora_and_an_exported_one_have_cards_with_the_license(
    tiny_flux_copy: Path, tmp_path: Path
):
    """`svdq push` uploads what lies there: without a card, the license would be lost."""
    (tiny_flux_copy / "README.md").write_text(CARD)
    lora = tmp_path / "style.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in peft(small_lora(FOUR_BIT)).items()}, lora)
    convert(recipe_for(tiny_flux_copy), tmp_path / "out", options=RunOptions(device="cpu"))
    fold(tmp_path / "out", [(lora, 0.8)], tmp_path / "styled")
    card = ModelCard.load(tmp_path / "styled/README.md")
    said = card.data.to_dict()
    assert said["license_name"] == "flux-1-dev-non-commercial-license"
    assert {"lora", "int4", "nunchaku-lite"} <= set(said["tags"])
    assert "| style.safetensors | 0.8 |" in card.content
    assert str(tmp_path) not in card.content
    uploaded = [file.path for file in push(tmp_path / "styled", "owner/name", dry_run=True).files]
    assert "README.md" in uploaded

    export(tmp_path / "out", "nunchaku", tmp_path / "exported.safetensors")
    exported = ModelCard.load(tmp_path / "exported.safetensors.README.md").data.to_dict()
    assert exported["license_name"] == "flux-1-dev-non-commercial-license"
    assert "nunchaku" in exported["tags"]
    uploaded = push(tmp_path / "exported.safetensors", "owner/name", dry_run=True).files
    assert "README.md" in [file.path for file in uploaded]
