"""The model card of a checkpoint, converted or made from another one: `README.md` with the header that the Hub reads.

The same checkpoint has the same card: nothing in it tells where or how fast it was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from svdq_cli import __version__
from svdq_cli.checkpoint.reader import Checkpoint
from svdq_cli.formats.soundness import dtype_name
from svdq_cli.prepare.facts import layers_text
from svdq_cli.prepare.locate import hub_id
from svdq_cli.records import NvFp4
from svdq_cli.reports import ConvertReport, LoraFacts, RankFacts, TextEncoderFacts, to_json
from svdq_cli.source import is_expert, pipeline_index
from svdq_cli.storage.pipeline_index import is_pipeline
from svdq_cli.text import cell, number, table

CARD_FILE = "README.md"
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
    "The header of the weights holds recipe, versions and sha256 of all inputs; `svdq inspect` shows them."
)


def card_path(file: Path) -> Path:
    """Where the card of a single file is stored: CKPT.README.md next to it."""
    return file.with_name(f"{file.name}.{CARD_FILE}")


def model_card(
    report: ConvertReport, dtype: torch.dtype, *, pipeline: Path | None, beside: Path | None = None
) -> str:
    """The card of an output whose 16-bit tensors are `dtype`. `pipeline`: the source's folder, whose license is carried
    over; `beside`: the recipe's."""
    name = hub_id(str(_model(report)["source"]), beside=beside)
    tags = [report.precision, *(output.format for output in report.outputs)]
    said = _header_of(pipeline / CARD_FILE, _CARRIED_OVER) if pipeline else {}
    lines = [_header(said, name, pipeline, tags), "", *_body(report, dtype, name)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class DerivedFacts:
    """A checkpoint that was made from another one: exported, or with LoRAs folded in."""

    format: str
    single_file: bool
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
        named = [(PurePath(lora.path).name, f"{lora.weight:g}", lora.sha256) for lora in facts.loras]
        yield from table(("LoRA", "weight", "sha256"), named)
        yield ""
    layers = [layer.name for layer in checkpoint.layers]
    single = [facts.format] if facts.single_file else []
    yield from _loading(
        single, checkpoint.dtype, pipeline=not facts.single_file, experts=any(map(is_expert, layers))
    )
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
    if re.search("Video|Wan|LTX|Mochi", name):
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


def _body(report: ConvertReport, dtype: torch.dtype, base_model: str | None) -> Iterator[str]:
    if any(output.format == COMFY_CORE for output in report.outputs):
        yield from _branchless_title(report, base_model)
    else:
        yield from _title(base_model, report.model.model_class, report.precision)
    yield f"svdq {report.svdq_version}."
    yield ""
    yield from table(("", ""), list(_facts(report)))
    yield ""
    single = [output.format for output in report.outputs if output.path.endswith(".safetensors")]
    whole = len(single) < len(report.outputs)
    experts = any(map(is_expert, report.layer_sqnr_db.per_layer))
    yield from _loading(
        single, dtype, pipeline=whole, experts=experts, encoders=bool(report.text_encoders) and whole
    )
    yield ""
    worst = sorted(report.layer_sqnr_db.per_layer.items(), key=lambda item: item[1])[:WORST_LAYERS]
    yield from table(("worst layers", "SQNR (dB)"), [(name, number(value)) for name, value in worst])
    yield ""
    yield _PROVENANCE


def _facts(report: ConvertReport) -> Iterator[tuple[object, ...]]:
    rank, sqnr, counts = report.rank, report.layer_sqnr_db, report.layers
    yield "model", f"{report.model.model_class}, {report.model.parameters} parameters"
    yield (
        "size",
        f"{report.bytes.output} bytes, {report.bytes.ratio:.2f} times smaller than at 16 bits",
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


def _loading(
    single: Sequence[str], dtype: torch.dtype, *, pipeline: bool, experts: bool, encoders: bool = False
) -> Iterator[str]:
    """`single`: the formats of the outputs that are single files; `pipeline`: whether one is a pipeline folder;
    `experts`: whether layers are experts that diffusers stacks in one tensor, so that it can't load them; `encoders`:
    whether text encoders of it have 4-bit weights."""
    yield "## How to load it"
    yield ""
    if encoders:
        yield "The text encoders' 4-bit layers need bitsandbytes (`pip install bitsandbytes`)."
        yield ""
    if experts:
        yield "Its experts are layers of their own, for which diffusers' own loader has no place; svdq runs them:"
        base = "" if pipeline else ', base="PIPELINE_FOLDER"'
    elif pipeline:
        yield "Where diffusers' 4-bit runtime runs (diffusers 0.42 and later with `kernels`; NVIDIA GPUs but Hopper's)."
        yield "diffusers downloads its kernels from a repository on the Hub, and asks you to allow that code to run:"
        yield ""
        yield from ("```sh", "export DIFFUSERS_TRUST_REMOTE_KERNELS=true", "```", "")
        # without a dtype diffusers makes the other components float32, which the transformer can't take
        where, name = "THIS_FOLDER_OR_REPOSITORY", dtype_name(dtype)
        yield from ("```python", "import torch", "from diffusers import DiffusionPipeline", "")
        yield from (f'pipe = DiffusionPipeline.from_pretrained("{where}", dtype=torch.{name})', "```", "")
        yield "Anywhere, a CPU too:"
        base = ""
    elif single[0] == COMFY_CORE:
        yield "In ComfyUI 0.38 and later: put the file into `models/diffusion_models` and choose it in the node Load"
        yield "Diffusion Model. In diffusers, on a CPU too:"
        base = ', base="PIPELINE_FOLDER"'
    else:
        yield f"In the runtime that reads {cell(single[0])} files; in diffusers, on a CPU too:"
        base = ', base="PIPELINE_FOLDER"'
    yield ""
    yield from ("```python", "import svdq_cli", "", f'pipe = svdq_cli.load_pipeline("PATH"{base})', "```")
