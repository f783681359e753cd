"""Which denoiser of a pipeline with several (the two transformers of Wan 2.2) a LoRA is for.

Both denoisers have layers of the same names and sizes. So the user says it, or the names in the file do
(`transformer_2.`), or the file's own name (`high_noise`, `low_noise`), or it fits only one of them. Otherwise it is
refused: in the wrong denoiser a LoRA loads without an error and spoils every video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from svdq_cli.adapters.configs import WEIGHT_FILE
from svdq_cli.adapters.names import ModelShapes, names_denoiser
from svdq_cli.adapters.read import Adapter, adapter_file, read_adapter
from svdq_cli.errors import InputError, UsageError
from svdq_cli.source.denoisers import component_of, named_denoiser
from svdq_cli.source.headers import is_gguf, read_header

# Names that trainers give every LoRA: what tells one from another is the folder
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", WEIGHT_FILE)


class LoraFile(NamedTuple):
    """A LoRA that a user names: its file or peft's folder, its strength, and the denoiser that it is for; None where
    the user does not say."""

    path: Path
    weight: float = 1.0
    component: str | None = None


def chosen_denoiser(lora: LoraFile, model: ModelShapes) -> str | None:
    """The denoiser that a LoRA is for; None where the model has one alone, or the names in the file tell.

    Raises UsageError for a denoiser that the model lacks and where nothing tells which, InputError for a LoRA that fits
    none.
    """
    components = model.components
    if lora.component is not None and lora.component not in components:
        raise UsageError(
            f"{lora.path}: there is no denoiser {lora.component!r} for it",
            hint=f"there is {' and '.join(components)}",
            where=str(lora.path),
        )
    if len(components) == 1 or lora.component is not None:
        return lora.component if len(components) > 1 else None
    file = adapter_file(lora.path)
    if not is_gguf(file) and names_denoiser(read_header(file), model):
        return None
    return named_denoiser(components, _telling_name(file)) or _only_fitting(lora, model)


def read_lora(lora: LoraFile, model: ModelShapes) -> Adapter:
    """The adapter for the denoiser that it is for (`chosen_denoiser`), with a note where nobody has said which. Raises
    as `read_adapter` does, too."""
    chosen = chosen_denoiser(lora, model)
    adapter = read_adapter(lora.path, model, chosen)
    named = named_denoiser(model.components, _telling_name(adapter.path))
    if chosen is None or (lora.component is not None and named in (None, chosen)):
        return adapter
    if lora.component is not None:
        told = f"{adapter.path}: for {chosen}, as said, though its name says {named}"
    elif named is not None:
        told = f"{adapter.path}: by its name for {chosen}"
    else:
        told = f"{adapter.path}: for {chosen}, the only denoiser that it fits"
    return replace(adapter, notes=(*adapter.notes, told))


def denoisers_left(components: Sequence[str], adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A warning that names the denoisers that no LoRA changes, where LoRAs change the others. LoRAs of Wan 2.2 come in
    pairs."""
    touched = {
        component_of(components, name)[0] for each in adapters for name in (*each.weights, *each.vectors)
    }
    left = [name for name in components if name not in touched]
    if not touched or not left:
        return ()
    return (f"no LoRA is for {' and '.join(left)}: LoRAs for a pipeline with several denoisers come in sets",)


def _telling_name(file: Path) -> str:
    return file.parent.name if file.name in _USUAL_NAMES else file.stem


def _only_fitting(lora: LoraFile, model: ModelShapes) -> str:
    fitting: list[str] = []
    misfits: list[InputError] = []
    for component in model.components:
        try:
            read_adapter(lora.path, model, component)
        except InputError as error:
            if error.kind != "lora-mismatch":
                raise
            misfits.append(error)
        else:
            fitting.append(component)
    if not fitting:
        first = misfits[0]
        raise InputError(
            f"{first.message}; nor does it fit {' or '.join(model.components[1:])}",
            hint=first.hint,
            where=first.where,
            kind=first.kind,
        )
    if len(fitting) > 1:
        raise UsageError(
            f"{lora.path}: a LoRA for one of {' and '.join(model.components)}, but nothing tells for which",
            hint=f"--lora FILE:{lora.weight:g}:{fitting[-1]}, or in a recipe {{path: FILE, component: {fitting[-1]}}}; "
            "name it twice if it is for both",
            where=str(lora.path),
            kind="several-denoisers",
        )
    return fitting[0]
