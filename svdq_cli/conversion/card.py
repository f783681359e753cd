"""The model card of a checkpoint, converted or made from another one: `README.md` with the header that the Hub reads.

The same checkpoint has the same card: nothing in it tells where or how fast it was made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from svdq_cli import __version__
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.formats import format_named
from svdq_cli.formats.soundness import dtype_name
from svdq_cli.prepare.facts import layers_text
from svdq_cli.prepare.locate import hub_id
from svdq_cli.records import NvFp4
from svdq_cli.reports import ConvertReport, LoraFacts, OutputFile, RankFacts, TextEncoderFacts, to_json
from svdq_cli.source import is_expert, pipeline_index
from svdq_cli.storage.pipeline_index import is_modular, is_pipeline
from svdq_cli.text import cell, number, table

CARD_FILE = "README.md"
HERE = "."  # in code that runs in the output's folder
# the same where transformers reads components, which with "." looks for some of their files in the wrong folder
_IMPORT_OS, _ABSOLUTE = "import os", f'os.path.abspath("{HERE}")'
_BASE = "PIPELINE_FOLDER"
WORST_LAYERS = 5
_MAX_BYTES = 1 << 20  # of a card that is read
_CARRIED_OVER = ("license", "license_name", "license_link", "pipeline_tag", "language")
_OF_THE_BASE = (*_CARRIED_OVER, "base_model")  # what a card made from a checkpoint's card repeats
_WORD = re.compile(r"[\w .:/+-]{1,200}")  # what a license, a tag or a link consists of
_PAPER = "https://arxiv.org/abs/2411.05007"
COMFY_CORE = "comfy-core"  # the format without a low-rank branch
_CONVROT = "https://arxiv.org/abs/2512.03673"
_SMOOTHQUANT = "https://arxiv.org/abs/2211.10438"
_PROVENANCE = (
    "The header of the weights holds recipe, versions and sha256 of all inputs; `svdq inspect --json` shows "
    "them."
)


def card_path(file: Path) -> Path:
    """Where the card of a single file is stored: CKPT.README.md next to it."""
    return file.with_name(f"{file.name}.{CARD_FILE}")


def model_cards(
    report: ConvertReport, dtype: torch.dtype, *, pipeline: Path | None, beside: Path | None = None
) -> tuple[str, ...]:
    """The card of each output, whose 16-bit tensors are `dtype`. `pipeline`: the source's folder, whose license is
    carried over; `beside`: the recipe's."""
    return tuple(_model_card(report, output, dtype, pipeline, beside) for output in report.outputs)


def _model_card(
    report: ConvertReport, output: OutputFile, dtype: torch.dtype, pipeline: Path | None, beside: Path | None
) -> str:
    name = hub_id(str(_model(report)["source"]), beside=beside)
    said = _header_of(pipeline / CARD_FILE, _CARRIED_OVER) if pipeline else {}
    single = format_named(output.format).single_file
    file = PurePath(output.path).name if single else None
    whole = pipeline is not None and not single
    modular = pipeline is not None and is_modular(pipeline)
    place = _Place(output.format, report.model.model_class, dtype, file, whole, name, modular)
    header = _header(said, name, pipeline, [report.precision, output.format])
    return "\n".join([header, "", *_body(report, output, place)]) + "\n"


@dataclass(frozen=True, slots=True)
class DerivedFacts:
    """A checkpoint that was made from another one: exported, or with LoRAs folded in."""

    format: str
    file: str | None  # its name; None for a folder
    whole: bool  # a pipeline's folder
    bytes: int  # of its weight file
    loras: tuple[LoraFacts, ...] = ()


def derived_card(checkpoint: Checkpoint, facts: DerivedFacts) -> str:
    """The card of an output that was made from `checkpoint`, whose license and base model it repeats."""
    path, pipeline = checkpoint.source.path, checkpoint.source.pipeline
    said = _header_of(card_path(path) if path.is_file() else path / CARD_FILE, _OF_THE_BASE)
    base_model = said.pop("base_model", None)
    precision = checkpoint.precision.name if checkpoint.precision else "int4"
    tags = [precision, facts.format, *(["lora"] if facts.loras else [])]
    lines = [_header(said, base_model, pipeline, tags), "", *_derived_body(checkpoint, facts, base_model)]
    return "\n".join(lines) + "\n"


def _derived_body(checkpoint: Checkpoint, facts: DerivedFacts, base_model: str | None) -> Iterator[str]:
    precision = checkpoint.precision.name if checkpoint.precision else "int4"
    yield from _title(base_model, checkpoint.model_class, precision, " with LoRAs" if facts.loras else "")
    yield f"svdq {__version__} from a checkpoint in format {checkpoint.format.name}, without quantizing again."
    yield ""
    counts = f"{len(checkpoint.plan().w4a4)} W4A4, {len(checkpoint.plan().w4a16)} W4A16"
    rows = [("model", f"{checkpoint.model_class}, {checkpoint.parameters} parameters"), ("layers", counts)]
    yield from table(("", ""), [*rows, ("precision", precision), ("size", f"{facts.bytes} bytes")])
    yield ""
    if facts.loras:
        yield "LoRAs in the low-rank branch. Their own licenses apply too."
        yield ""
        for_one = any(lora.component for lora in facts.loras)
        named = [
            (
                PurePath(lora.path).name,
                f"{lora.weight:g}",
                *([lora.component or ""] if for_one else []),
                lora.sha256,
            )
            for lora in facts.loras
        ]
        yield from table(("LoRA", "weight", *(["for"] if for_one else []), "sha256"), named)
        yield ""
    layers = [layer.name for layer in checkpoint.layers]
    pipeline = checkpoint.source.pipeline
    modular = pipeline is not None and is_modular(pipeline)
    place = _Place(
        facts.format, checkpoint.model_class, checkpoint.dtype, facts.file, facts.whole, base_model, modular
    )
    yield from _loading(place, experts=any(map(is_expert, layers)))
    yield ""
    yield _PROVENANCE


def _header(said: dict[str, Any], base_model: str | None, pipeline: Path | None, tags: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    license_file = pipeline is not None and any(pipeline.glob("LICENSE*"))
    if "license" not in said and license_file:  # a copied license file without a stated name
        said |= {"license": "other", "license_link": "LICENSE"}
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        tags=[_method(tags), "quantized", *tags],
        pipeline_tag=said.pop("pipeline_tag", None) or _pipeline_tag(pipeline),
        **({"base_model_relation": "quantized"} if base_model else {}),
        **said,
    )
    return f"---\n{data.to_yaml()}\n---"


def _method(tags: Sequence[str]) -> str:
    if COMFY_CORE not in tags:
        return "svdquant"
    return "smoothquant" if NvFp4.name in tags else "convrot"


def _header_of(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What a card says under some keys, to be repeated. A card that can't be read says nothing."""
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return {}
    from huggingface_hub import ModelCard

    try:
        said = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # someone else's YAML: whatever is wrong with it, the license can't be read from it
        return {}
    return {key: value for key in keys if isinstance(value := said.get(key), str) and _WORD.fullmatch(value)}


def _pipeline_tag(pipeline: Path | None) -> str:
    """The pipeline tag of the Hub (text-to-image ...), from the name of the pipeline's class."""
    name = str(pipeline_index(pipeline).get("_class_name")) if pipeline and is_pipeline(pipeline) else ""
    if re.search("Music|Audio|AceStep", name):
        return "text-to-audio"
    if re.search("Animate2|ImageToVideo|Image2Video", name):
        return "image-to-video"
    if re.search("Video|Wan|LTX|Mochi|MiniMaxH3", name):
        return "text-to-video"
    return (
        "image-to-image" if re.search("Img2Img|Kontext|Edit|Fill|Inpaint|Control", name) else "text-to-image"
    )


def _branchless_title(report: ConvertReport, base_model: str | None) -> Iterator[str]:
    """The first lines of the body of a file for ComfyUI itself, up to "made with"."""
    model_class, floats = report.model.model_class, report.precision == NvFp4.name
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else cell(model_class)
    title = f"{'nvfp4' if floats else 'ConvRot int4'} for ComfyUI"
    yield f"# {cell((base_model or model_class).rpartition('/')[2])}, {title}"
    yield ""
    how = f"smoothed ([SmoothQuant]({_SMOOTHQUANT}))" if floats else f"rotated ([ConvRot]({_CONVROT}))"
    if floats and report.data_free:
        how = "not smoothed, for there was no calibration,"
    yield f"{source} with 4-bit weights, for ComfyUI without custom nodes. Inputs are {how}"
    yield "and quantized. There is no low-rank branch as in SVDQuant's files: where layers are W4A4, quality is lower."
    yield "Made with"


def _title(base_model: str | None, model_class: str, precision: str, more: str = "") -> Iterator[str]:
    """The first lines of the body, up to "made with"."""
    source = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else cell(model_class)
    yield f"# {cell((base_model or model_class).rpartition('/')[2])}, SVDQuant {precision}{more}"
    yield ""
    yield f"{source} with 4-bit weights and activations and a 16-bit low-rank branch ([SVDQuant]({_PAPER})), made with"


def _body(report: ConvertReport, output: OutputFile, place: _Place) -> Iterator[str]:
    if output.format == COMFY_CORE:
        yield from _branchless_title(report, place.base_model)
    else:
        yield from _title(place.base_model, report.model.model_class, report.precision)
    yield f"svdq {report.svdq_version}."
    yield ""
    yield from table(("", ""), list(_facts(report, output)))
    yield ""
    experts = any(map(is_expert, report.layer_sqnr_db.per_layer))
    yield from _loading(
        place,
        experts=experts,
        encoders=bool(report.text_encoders) and place.whole,
        modulations=report.layers.w4a16 > 0,
    )
    yield ""
    worst = sorted(report.layer_sqnr_db.per_layer.items(), key=lambda item: item[1])[:WORST_LAYERS]
    yield from table(("worst layers", "SQNR (dB)"), [(name, number(value)) for name, value in worst])
    yield ""
    yield _PROVENANCE


def _facts(report: ConvertReport, output: OutputFile) -> Iterator[tuple[object, ...]]:
    rank, sqnr, counts = report.rank, report.layer_sqnr_db, report.layers
    yield "model", f"{report.model.model_class}, {report.model.parameters} parameters"
    yield (
        "size",
        f"{output.bytes} bytes, {report.bytes.input / output.bytes:.2f} times smaller than at 16 bits",
    )
    yield "precision", report.precision
    yield "rank", _rank_text(rank)
    yield "effort", f"{report.effort}{', without calibration' if report.data_free else ''}"
    yield "layers", layers_text(counts)
    on = "of weights" if report.data_free else "of outputs, on calibration rows"
    yield f"layer SQNR {on}", f"{sqnr.mean:.1f} dB on average, {sqnr.min:.1f} dB at worst"
    for name, encoder in report.text_encoders.items():
        yield name, _encoder_text(encoder)
    for gate, condition in _gates(report).items():
        missed = next((text for text in report.gates_missed if text.startswith(f"{gate} ")), None)
        yield f"gate {gate} {condition}", f"missed: {missed}" if missed else "met, or left to svdq eval"


def _encoder_text(encoder: TextEncoderFacts) -> str:
    size = f"{encoder.bytes.output} bytes, {encoder.bytes.ratio:.2f} times smaller than at 16 bits"
    states = encoder.hidden_sqnr_db
    near = f"; hidden states {states.last:.1f} dB SQNR on held-out prompts" if states else ""
    return f"{cell(encoder.model_class)} with {encoder.w4a16} layers in NF4 (bitsandbytes), {size}{near}"


def _rank_text(rank: RankFacts) -> str | int:
    if not rank.max:
        return "none: no low-rank branch"
    return rank.max if rank.min == rank.max else f"{rank.min} to {rank.max}, {rank.mean:.1f} on average"


def _gates(report: ConvertReport) -> Mapping[str, object]:
    gates = report.recipe.get("gates")
    return gates if isinstance(gates, Mapping) else {}


def _model(report: ConvertReport) -> Mapping[str, object]:
    model = to_json(report)["recipe"]["model"]  # type: ignore[index]
    assert isinstance(model, Mapping)
    return model


@dataclass(frozen=True, slots=True)
class _Place:
    """What an output is: a single file of that name, or a folder, of a pipeline or of one component."""

    format: str
    model_class: str
    dtype: torch.dtype
    file: str | None  # None for a folder
    whole: bool  # a pipeline's folder
    base_model: str | None
    modular: bool  # whether the pipeline is one of Modular Diffusers


def _loading(
    place: _Place, *, experts: bool, encoders: bool = False, modulations: bool = False
) -> Iterator[str]:
    """Code that works as it is: in a folder, and next to a file. `experts`: whether layers are experts that diffusers
    stacks in one tensor, so that it can't load them; `encoders`: whether text encoders of it have 4-bit weights;
    `modulations`: whether it has W4A16 layers."""
    yield "## How to load it"
    yield ""
    if encoders:
        yield "The text encoders' 4-bit layers need bitsandbytes (`pip install bitsandbytes`)."
        yield ""
    if experts:
        yield "Its experts are layers of their own, for which diffusers' own loader has no place; svdq runs them:"
    elif place.file is None:
        yield from _in_diffusers(place)
        yield "Anywhere, a CPU too:"
    elif place.format == COMFY_CORE:
        yield from _in_comfyui(modulations)
        yield "In diffusers, on a CPU too:"
    else:
        yield f"In the runtime that reads {cell(place.format)} files; in diffusers, on a CPU too:"
    yield ""
    if not place.whole:
        yield from _base_pipeline(place.base_model)
    base = "" if place.whole else f', base="{_BASE}"'
    path = json.dumps(place.file or HERE, ensure_ascii=False)
    yield from ("```python", "import svdq_cli", "", f"pipe = svdq_cli.load_pipeline({path}{base})", "```")


def _in_comfyui(modulations: bool) -> Iterator[str]:
    """From which version on, and with which LoRA node."""
    since = "0.38.1 and later (0.37 stops at `awq_w4a16`)" if modulations else "0.33 and later"
    yield f"In ComfyUI {since}: put the file into `models/diffusion_models` and choose it in the node Load Diffusion"
    yield "Model."
    if modulations:
        yield "LoRAs that change modulation layers need the node Load LoRA (Bypass); the ordinary one stops with an"
        yield "error."
    yield ""


def _in_diffusers(place: _Place) -> Iterator[str]:
    """What diffusers' own loader takes, in the output's folder."""
    yield "Where diffusers' 4-bit runtime runs (diffusers 0.42 and later with `kernels`; NVIDIA GPUs but Hopper's)."
    yield "diffusers downloads its kernels from a repository on the Hub, and asks you to allow that code to run:"
    yield ""
    yield from ("```sh", "export DIFFUSERS_TRUST_REMOTE_KERNELS=true", "```", "")
    yield "In this folder (from elsewhere, with its path or the repository's name in place of the dot):"
    yield ""
    name = dtype_name(place.dtype)
    yield "```python"
    if place.whole and place.modular:
        yield _IMPORT_OS
    yield "import torch"
    if place.whole and place.modular:
        yield from ("from diffusers import ModularPipeline", "")
        yield f"pipe = ModularPipeline.from_pretrained({_ABSOLUTE})"
        yield f"pipe.load_components(dtype=torch.{name})"
    elif place.whole:
        # without a dtype diffusers makes the other components float32, which the transformer can't take
        yield from ("from diffusers import DiffusionPipeline", "")
        yield f'pipe = DiffusionPipeline.from_pretrained("{HERE}", dtype=torch.{name})'
    else:
        yield from (f"from diffusers import {place.model_class}", "")
        yield f'model = {place.model_class}.from_pretrained("{HERE}", torch_dtype=torch.{name})'
    yield from ("```", "")


def _base_pipeline(base_model: str | None) -> Iterator[str]:
    """How to come by the other components."""
    if base_model is None:
        yield f"`{_BASE}` is the folder of the 16-bit pipeline, which has the other components."
    else:
        yield "The other components are those of the 16-bit pipeline:"
        yield ""
        yield from ("```sh", f"hf download {base_model} --local-dir {_BASE}", "```")
    yield ""


def with_repository(card: str, repository: str) -> str:
    """The card as it is read on the Hub, where code runs in no folder of the repository."""
    card = card.replace(f"```python\n{_IMPORT_OS}\n", "```python\n").replace(_ABSOLUTE, f'"{repository}"')
    return card.replace(f'.from_pretrained("{HERE}"', f'.from_pretrained("{repository}"')
