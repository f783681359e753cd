"""Files and folders that are not a diffusion model: what they are, told by keys, names and first bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.storage.pipeline_index import is_pipeline


@dataclass(frozen=True, slots=True)
class OtherFile:
    """A kind of file. `pattern` is found in some key of every such file, and of no diffusion model."""

    name: str
    pattern: re.Pattern[str]
    hint: str


_PART = "give the diffusion model; this file belongs in the pipeline folder given with --base"
OTHER_FILES = (
    OtherFile(
        "a LoRA",
        re.compile(
            r"[._]lora\d?[._](A|B|up|down)\b|\.lora_linear_layer\.|\.hada_w1_a|\.lokr_w1|\.oft_blocks|\.lora_[ab]$"
        ),
        "give the model it belongs to, and this file with --lora FILE:WEIGHT",
    ),
    OtherFile(
        "an autoencoder (VAE)",
        re.compile(r"^(vae\.|first_stage_model\.)?decoder\.(conv_in|conv1|middle|project_in)\."),
        _PART,
    ),
    OtherFile(
        "a text encoder",
        re.compile(r"^(encoder\.block\.0\.layer\.|(text_model\.)?embeddings\.token_|model\.embed_tokens\.)"),
        _PART,
    ),
    OtherFile(
        "a text encoder or another part of a language model (llama.cpp's names)",
        re.compile(r"^(token_embd\.|(v\.|a\.|enc\.|dec\.)?blk\.\d+\.|mm\.\d+\.)"),
        "give the diffusion model; text encoders come from the pipeline folder given with --base",
    ),
    OtherFile(
        "a ControlNet",
        re.compile(r"^(control_model\.|controlnet_|controlnet\.|input_hint_block\.)"),
        "svdq converts the model that a ControlNet controls, not the ControlNet",
    ),
)


def refuse_other_files(path: Path, names: Iterable[str]) -> None:
    """InputError that says what the file is."""
    found = list(names)
    for kind in OTHER_FILES:
        if name := next((name for name in found if kind.pattern.search(name)), None):
            raise InputError(
                f"{path}: {kind.name}, not a diffusion model; it holds {name}",
                hint=kind.hint,
                where=str(path),
                kind="unknown-family",
            )


# What models are exported to, by the suffix of a file or folder; none of it are weights that svdq reads
_EXPORTS = {
    ".onnx": "an ONNX model",
    ".xml": "an OpenVINO model",
    ".engine": "a TensorRT engine",
    ".plan": "a TensorRT engine",
    ".trt": "a TensorRT engine",
    ".mlpackage": "a Core ML model",
    ".mlmodelc": "a Core ML model",
    ".mlmodel": "a Core ML model",
    ".msgpack": "Flax weights",
    ".h5": "Keras weights",
    ".tflite": "a LiteRT model",
    ".npz": "an archive of NumPy arrays",
}
_EXPORTED = "convert the model it was made from: a diffusers pipeline folder, or a .safetensors or .gguf file"
_ARRAYS = "save them as safetensors: safetensors.numpy.save_file(dict(numpy.load(FILE)), OUT)"


def is_openvino_weights(path: Path) -> bool:
    """Whether a `.bin` file is the weights of an OpenVINO model, which is next to it, and no pickle."""
    return path.suffix == ".bin" and path.with_suffix(".xml").is_file()


def refuse_exports(path: Path) -> None:
    """InputError for a model in the format of another framework or runtime: a file, a folder that is one, or a folder
    that holds one."""
    for file in (path, *(sorted(path.iterdir()) if path.is_dir() else ())):
        suffix = ".xml" if is_openvino_weights(file) else file.suffix.lower()
        if what := _EXPORTS.get(suffix):
            raise InputError(
                f"{path}: {what if file == path else f'holds {what} ({file.name})'}, which svdq does not read",
                hint=_ARRAYS if suffix == ".npz" else _EXPORTED,
                where=str(file),
            )


_OTHER_CLASSES = (  # of configs, by the start or a part of the class's name
    (re.compile(r"^(Asymmetric)?Autoencoder|^VQModel|VAE|^ConsistencyDecoder"), "an autoencoder"),
    (re.compile(r"ControlNet"), "a ControlNet"),
    (re.compile(r"Scheduler$"), "a scheduler"),
    (re.compile(r"Pipeline$"), "the index of a pipeline"),
)
_OTHER_CONFIGS = (
    ("scheduler_config.json", "a scheduler"),
    ("tokenizer_config.json", "a tokenizer"),
    ("preprocessor_config.json", "an image processor"),
)


def refuse_other_components(path: Path, config: Mapping[str, object] | None) -> None:
    """InputError for another part of a pipeline than its transformer or UNet. `path`: its folder, or a config file;
    `config`: what `config.json` says, None where the folder has none."""
    name = str((config or {}).get("_class_name") or "")
    architectures = (config or {}).get("architectures")
    found = next((what for pattern, what in _OTHER_CLASSES if pattern.search(name)), None)
    if found is None and not name and isinstance(architectures, list) and architectures:
        found, name = "a text encoder or another model of transformers", str(architectures[0])
    if found is None and config is None:
        found = next((what for file, what in _OTHER_CONFIGS if (path / file).is_file()), None)
    if found is None:
        return
    folder = path if path.is_dir() else path.parent
    above = next((parent for parent in (folder, folder.parent) if is_pipeline(parent)), None)
    raise InputError(
        f"{path}: {found}{f' ({name})' if name else ''}, not a diffusion model",
        hint=f"give the pipeline it belongs to: {above}" if above else "give the pipeline's folder",
        where=str(path),
        kind="unknown-family",
    )
