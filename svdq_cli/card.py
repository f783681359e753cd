"""The model card of a checkpoint: `README.md` with the header that the Hugging Face hub reads.

The same checkpoint has the same card: nothing in it tells where or how fast it was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from svdq_cli.locate import hub_id
from svdq_cli.markdown import cell, number, table
from svdq_cli.records import ConvertReport, to_json
from svdq_cli.source import read_json

CARD_FILE = "README.md"
WORST_LAYERS = 5
_MAX_BYTES = 1 << 20  # of a card that is read
_CARRIED_OVER = ("license", "license_name", "license_link", "pipeline_tag", "language")
_WORD = re.compile(r"[\w .:/+-]{1,200}")  # what a license, a tag or a link consists of
_PAPER = "https://arxiv.org/abs/2411.05007"


def card_path(file: Path) -> Path:
    """Where the card of a single file lies: CKPT.README.md beside it."""
    return file.with_name(f"{file.name}.{CARD_FILE}")


def model_card(report: ConvertReport, *, pipeline: Path | None, beside: Path | None = None) -> str:
    """The card of an output. `pipeline`: the source's folder, whose license is carried over; `beside`: the recipe's."""
    name = hub_id(str(_model(report)["source"]), beside=beside)
    lines = [_header(report, name, pipeline), "", *_body(report, name)]
    return "\n".join(lines) + "\n"


def _header(report: ConvertReport, base_model: str | None, pipeline: Path | None) -> str:
    from huggingface_hub import ModelCardData

    said = _source_header(pipeline)
    license_file = pipeline is not None and any(pipeline.glob("LICENSE*"))
    if "license" not in said and license_file:  # one that goes along, and whose name nobody said
        said |= {"license": "other", "license_link": "LICENSE"}
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        tags=["svdquant", "quantized", report.precision, *(output.format for output in report.outputs)],
        pipeline_tag=said.pop("pipeline_tag", None) or _pipeline_tag(pipeline),
        **({"base_model_relation": "quantized"} if base_model else {}),
        **said,
    )
    return f"---\n{data.to_yaml()}\n---"


def _source_header(pipeline: Path | None) -> dict[str, Any]:
    """What the source's card says and this one repeats. A card that can't be read says nothing."""
    path = pipeline / CARD_FILE if pipeline else None
    if path is None or not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return {}
    from huggingface_hub import ModelCard

    try:
        said = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # someone else's YAML: whatever is wrong with it, the license can't be read from it
        return {}
    return {
        key: value
        for key in _CARRIED_OVER
        if isinstance(value := said.get(key), str) and _WORD.fullmatch(value)
    }


def _pipeline_tag(pipeline: Path | None) -> str:
    """What the pipeline's class draws, from its name."""
    index = pipeline / "model_index.json" if pipeline else None
    name = str(read_json(index).get("_class_name")) if index and index.is_file() else ""
    if re.search("Video|Wan|LTX|Mochi", name):
        return "text-to-video"
    return (
        "image-to-image" if re.search("Img2Img|Kontext|Edit|Fill|Inpaint|Control", name) else "text-to-image"
    )


def _body(report: ConvertReport, base_model: str | None) -> Iterator[str]:
    source = (
        f"[{base_model}](https://huggingface.co/{base_model})"
        if base_model
        else cell(report.model.model_class)
    )
    yield f"# {cell((base_model or report.model.model_class).rpartition('/')[2])}, SVDQuant {report.precision}"
    yield ""
    yield f"{source} with 4-bit weights and activations and a 16-bit low-rank branch ([SVDQuant]({_PAPER})), made with"
    yield f"svdq {report.svdq_version}."
    yield ""
    yield from table(("", ""), list(_facts(report)))
    yield ""
    yield from _loading(report)
    yield ""
    worst = sorted(report.layer_sqnr_db.per_layer.items(), key=lambda item: item[1])[:WORST_LAYERS]
    yield from table(("worst layers", "SQNR (dB)"), [(name, number(value)) for name, value in worst])
    yield ""
    yield "The header of the weights holds the recipe, versions and sha256 of all inputs; `svdq inspect` shows them."


def _facts(report: ConvertReport) -> Iterator[tuple[object, ...]]:
    rank, sqnr, counts = report.rank, report.layer_sqnr_db, report.layers
    yield "model", f"{report.model.model_class}, {report.model.parameters} parameters"
    yield (
        "size",
        f"{report.bytes.input} -> {report.bytes.output} bytes, {report.bytes.ratio:.2f} times smaller",
    )
    yield "precision", report.precision
    yield (
        "rank",
        rank.max if rank.min == rank.max else f"{rank.min} to {rank.max}, {rank.mean:.1f} on average",
    )
    yield "effort", f"{report.effort}{', without calibration' if report.data_free else ''}"
    yield "layers", f"{counts.w4a4} W4A4, {counts.w4a16} W4A16, {counts.kept} kept at 16 bit"
    on = "of weights" if report.data_free else "of outputs, on calibration rows"
    yield f"layer SQNR {on}", f"{sqnr.mean:.1f} dB on average, {sqnr.min:.1f} dB at worst"
    for gate, condition in _gates(report).items():
        missed = next((text for text in report.gates_missed if text.startswith(f"{gate} ")), None)
        yield f"gate {gate} {condition}", f"missed: {missed}" if missed else "met, or judged by svdq eval"


def _gates(report: ConvertReport) -> Mapping[str, object]:
    gates = report.recipe.get("gates")
    return gates if isinstance(gates, Mapping) else {}


def _model(report: ConvertReport) -> Mapping[str, object]:
    model = to_json(report)["recipe"]["model"]  # type: ignore[index]
    assert isinstance(model, Mapping)
    return model


def _loading(report: ConvertReport) -> Iterator[str]:
    single = [output for output in report.outputs if output.path.endswith(".safetensors")]
    yield "## How to load it"
    yield ""
    if len(single) < len(report.outputs):
        yield "Where diffusers' 4-bit runtime runs (diffusers 0.42 and later with `kernels`, NVIDIA GPUs):"
        yield ""
        yield from ("```python", "from diffusers import DiffusionPipeline", "")
        yield from ('pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER_OR_REPOSITORY")', "```", "")
        yield "Anywhere, a CPU too:"
        base = ""
    else:
        yield f"In the runtime that reads {cell(single[0].format)} files; in diffusers, on a CPU too:"
        base = ', base="PIPELINE_FOLDER"'
    yield ""
    yield from ("```python", "import svdq_cli", "", f'pipe = svdq_cli.load_pipeline("PATH"{base})', "```")
