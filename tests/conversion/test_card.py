"""The model card: the hub can read its header, the license of the source goes along, and it betrays no folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from svdq_cli.adapters.denoiser import LoraFile
from svdq_cli.conversion.card import _base_pipeline, with_repository
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


# ------------------------------------------------------------------------------------------------- followed literally


def blocks(card: str, language: str) -> list[str]:
    """The card's blocks of code in a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def run_in(folder: Path, code: str, then: str) -> str:
    """What a new process in a folder prints that runs a card's code, and one line more."""
    command = [sys.executable, "-c", f"{code}\n{then}"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout.strip()


GENERATES = """
asked = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}
print(pipe("a red circle", **asked).images[0].size)
"""


@pytest.fixture(scope="module")
def several(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline and single files of one conversion, and the 16-bit pipeline next to them."""
    folder = tmp_path_factory.mktemp("several")
    names = {"nunchaku-lite": "lite", "nunchaku": "a model's.safetensors", "comfy": "comfy.safetensors"}
    outputs = [{"format": name, "path": str(folder / file)} for name, file in names.items()]
    recipe = with_overrides(recipe_for(tiny_flux), {"outputs": outputs})
    convert(recipe, tuple(folder / file for file in names.values()), options=RunOptions(device="cpu"))
    (folder / "PIPELINE_FOLDER").symlink_to(tiny_flux)
    return folder


def test_the_code_of_a_folders_card_runs_in_the_folder(several: Path):
    """Its first block is diffusers' own loader, which wants a GPU: tests/formats/test_diffusers_loader.py runs that."""
    card = (several / "lite" / "README.md").read_text()
    assert blocks(card, "sh") == ["export DIFFUSERS_TRUST_REMOTE_KERNELS=true\n"]
    theirs, ours = blocks(card, "python")
    assert 'DiffusionPipeline.from_pretrained(".", dtype=torch.bfloat16)' in theirs
    assert run_in(several / "lite", ours, GENERATES) == "(32, 32)"


@pytest.mark.parametrize("name", ["a model's.safetensors", "comfy.safetensors"])
def test_the_code_of_a_files_card_runs_next_to_the_file(several: Path, name: str):
    """Each output has the card of its own format, although one conversion made them."""
    card = (several / f"{name}.README.md").read_text()
    fmt = "comfy" if name.startswith("comfy") else "nunchaku"
    assert f"In the runtime that reads {fmt} files" in card
    assert f"{(several / name).stat().st_size} bytes" in card
    assert "`PIPELINE_FOLDER` is the folder of the 16-bit pipeline" in card
    (ours,) = blocks(card, "python")
    assert run_in(several, ours, GENERATES) == "(32, 32)"


def test_the_card_of_a_lone_component_loads_that(tiny_flux: Path, several: Path, tmp_path: Path):
    card = card_of(tiny_flux / "transformer", tmp_path / "out").content
    theirs, ours = blocks(card, "python")
    assert 'FluxTransformer2DModel.from_pretrained(".", torch_dtype=torch.bfloat16)' in theirs
    (tmp_path / "out" / "PIPELINE_FOLDER").symlink_to(tiny_flux)
    assert run_in(tmp_path / "out", ours, GENERATES) == "(32, 32)"


def test_a_model_of_the_hub_is_downloaded_by_its_name(several: Path):
    """As `hf` understands it."""
    lines = list(_base_pipeline("black-forest-labs/FLUX.1-dev"))
    (command,) = blocks("\n".join(lines), "sh")
    assert command == "hf download black-forest-labs/FLUX.1-dev --local-dir PIPELINE_FOLDER\n"
    asked = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "--help"]
    assert "--local-dir" in subprocess.run(asked, capture_output=True, text=True, check=True).stdout


def test_on_the_hub_the_code_names_the_repository(several: Path):
    card = with_repository((several / "lite" / "README.md").read_text(), "me/my-model")
    assert 'DiffusionPipeline.from_pretrained("me/my-model", dtype=torch.bfloat16)' in card
    assert 'svdq_cli.load_pipeline(".")' in card  # svdq reads what was downloaded


def test_the_step_that_a_conversion_names_next_works_as_printed(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from svdq_cli.cli import run

    out = tmp_path / "with a space"
    command = ["convert", str(tiny_flux), "-o", str(out), "--effort", "datafree", "--rank", "16"]
    assert run(command) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
    program, *arguments = shlex.split(line.removeprefix("next: "))
    assert program == "svdq"
    fast = "--samples 1 --steps 1 --height 32 --width 32 --without naive,floor,own-noise,outputs,nf4 -q"
    assert run([*arguments, *fast.split(), "--report", str(tmp_path / "report")]) == 0


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
    fold(tmp_path / "out", [LoraFile(lora, 0.8)], tmp_path / "styled")
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
