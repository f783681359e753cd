"""Modular pipelines whose index has components elsewhere: on the Hub, in other folders of this machine, or nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from svdq_cli.errors import InputError
from svdq_cli.prepare.locate import locate_source
from svdq_cli.source import denoiser_components, pipeline_index, text_encoders_of

INDEX = "modular_model_index.json"
HINTS = {
    "transformer": ("diffusers", "QwenImageTransformer2DModel"),
    "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "controlnet": ("diffusers", "QwenImageControlNetModel"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVDQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def component(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files or ("config.json",):
        (folder / name).write_text("{}")
    return folder


def saved_without_weights(folder: Path, **places: Any) -> Path:
    """An index as `ModularPipeline.save_config` writes it: what was not loaded is [null, null, how it is loaded].
    `places`: where and in which folder; the Hub's `owner/name` and its own name where a component is not in it."""
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"_class_name": "QwenImageModularPipeline"}
    for name, hint in HINTS.items():
        where, subfolder = places.get(name, ("owner/name" if name != "controlnet" else None, name))
        loading = {"type_hint": list(hint), "pretrained_model_name_or_path": where, "subfolder": subfolder}
        index[name] = [None, None, {**loading, "variant": None, "revision": None}]
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def on_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The Hub has everything at `root`; what was asked for."""
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, allow_patterns))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_components_are_taken_from_where_the_index_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = on_hub(component(tmp_path / "hub/tokenizer", "tokenizer_config.json").parent, monkeypatch)
    component(tmp_path / "finetuned", "config.json", "diffusion_pytorch_model.safetensors", "notes.md")
    pipeline = saved_without_weights(
        tmp_path / "pipeline",
        transformer=(str(tmp_path / "finetuned"), ""),
        text_encoder=("owner/name", "qwen"),
    )
    component(pipeline / "qwen")  # in the pipeline's own folder, under the name that the index gives it
    found = locate_source(str(pipeline))
    assert (found / "transformer/config.json").resolve() == tmp_path / "finetuned/config.json"
    assert (found / "text_encoder").resolve() == pipeline / "qwen"
    assert (found / "tokenizer/tokenizer_config.json").is_file()
    assert asked[0][0] == "owner/name", "only what is nowhere else comes from the Hub"
    assert all(pattern.startswith("tokenizer/") for pattern in asked[0][1])
    assert not (found / "transformer/notes.md").exists(), "what no component is read for is not copied either"
    # a folder of links, whose own index says that it holds everything
    assert denoiser_components(found) == ("transformer",)
    assert text_encoders_of(found) == ("text_encoder",)
    assert pipeline_index(found)["controlnet"] == [None, None], "the blocks do without"
    assert locate_source(str(pipeline)) == found


def test_a_folder_that_has_all_is_taken_as_it_is(tmp_path: Path, cache: Path):
    pipeline = saved_without_weights(tmp_path / "pipeline")
    for name in ("transformer", "text_encoder", "tokenizer"):
        component(pipeline / name)
    assert locate_source(str(pipeline)) == pipeline
    assert not cache.exists()


def test_what_no_run_needs_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = on_hub(tmp_path, monkeypatch)
    pipeline = saved_without_weights(tmp_path / "pipeline")
    index = json.loads((pipeline / INDEX).read_text())
    index["prompt_upsampler"] = [None, None, {**index["text_encoder"][2], "subfolder": ""}]
    (pipeline / INDEX).write_text(json.dumps(index))
    for name in ("transformer", "text_encoder", "tokenizer"):
        component(pipeline / name)
    assert locate_source(str(pipeline)) == pipeline
    assert not asked
    assert pipeline_index(pipeline)["prompt_upsampler"] == [None, None]


def test_without_a_connection_the_component_is_named_and_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def offline(name: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    pipeline = saved_without_weights(tmp_path / "pipeline")
    with pytest.raises(
        InputError, match=r"component 'transformer' comes from owner/name: .* local Hub cache"
    ) as refusal:
        locate_source(str(pipeline))
    assert refusal.value.hint == (
        "run `hf download owner/name --include 'transformer/*' --local-dir DIR` where there is a connection, and put "
        f"DIR/transformer at {pipeline / 'transformer'}"
    )


@pytest.mark.parametrize(
    ("where", "subfolder", "said"),
    [
        ("/nowhere/at/all", "", "which does not exist"),
        ("{tmp}/private", "", "where no component is"),
        ("{tmp}/weights.safetensors", "", "one file: only a component's folder can be read"),
        ("owner/name", "../../private", "leads out of it"),
        ("owner/name", "/etc", "leads out of it"),
    ],
)
def test_an_index_that_leads_to_anything_else_is_refused(
    tmp_path: Path, where: str, subfolder: str, said: str
):
    """What it leads to would be copied into the output, and pushed."""
    component(tmp_path / "private", "id_rsa", "secrets.txt")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    pipeline = saved_without_weights(
        tmp_path / "pipeline", transformer=(where.format(tmp=tmp_path), subfolder)
    )
    with pytest.raises(InputError, match=said) as refusal:
        locate_source(str(pipeline))
    assert str(pipeline / "transformer") in str(refusal.value.hint)


def test_a_component_s_name_can_t_lead_out_of_the_folder_of_links(tmp_path: Path, cache: Path):
    component(tmp_path / "elsewhere")
    pipeline = saved_without_weights(tmp_path / "pipeline", transformer=(str(tmp_path / "elsewhere"), ""))
    index = json.loads((pipeline / INDEX).read_text())
    index = {"_class_name": index["_class_name"], "../../out": index["transformer"]}
    (pipeline / INDEX).write_text(json.dumps(index))
    found = locate_source(str(pipeline))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="not a valid folder name"):
        pipeline_index(found)
