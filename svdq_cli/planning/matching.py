"""Whether the source's tensors are those of the model that its config describes, and who is to blame if not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from svdq_cli.errors import InputError
from svdq_cli.planning.inventory import Inventory
from svdq_cli.source import Source
from svdq_cli.source.configs import differences
from svdq_cli.source.single_file import BASE_HINT

# What diffusers' fuse_qkv_projections adds to an attention, whose own projections stay
_FUSED_COPY = re.compile(r"\.to_(added_)?(qkv|kv)\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class _Mismatch:
    what: str
    first: str  # a tensor's name
    where_folder: str  # what it means where the folder's own config describes the model


def require_own_tensors(source: Source, inventory: Inventory) -> None:
    """The tensors' names and shapes must be those of the model class. A bare config has none to check.

    Raises InputError by where the config is from: the folder itself, the base (`wrong-base`, by the values that differ
    as far as shapes show them), or svdq, which told it from the shapes (`needs-base`).
    """
    mismatch = _mismatch(source, inventory) if source.tensors else None
    if mismatch is None:
        return
    where = str(source.path)
    match source.config_from:
        case "folder":
            raise InputError(f"{where}: {mismatch.what}", hint=mismatch.where_folder, where=mismatch.first)
        case "base":
            raise _of_another_base(source, inventory, mismatch)
        case "shapes":
            raise InputError(
                f"{where}: a variant of {inventory.model_class} whose config can't be derived from names and shapes "
                f"({mismatch.what})",
                hint=BASE_HINT,
                where=mismatch.first,
                kind="needs-base",
            )


def _mismatch(source: Source, inventory: Inventory) -> _Mismatch | None:
    model = inventory.model_class
    if attached := sorted(name for name in source.tensors if ".base_layer." in name):
        return _Mismatch(
            f"{_counted(attached, 'belong to layers with an active adapter')}, such as {attached[0]}: the model "
            "was saved while a LoRA was loaded",
            attached[0],
            "save the model without the LoRA and give it as --lora; or, in diffusers, fuse_lora(), then "
            "unload_lora_weights(), then save_pretrained()",
        )
    if missing := [name for name in inventory.state if name not in source.tensors]:
        return _Mismatch(
            f"{_counted(missing, f'of {model} are missing')}, such as {missing[0]}",
            missing[0],
            "the download is incomplete or config.json belongs to a different model",
        )
    if extra := sorted(source.tensors.keys() - inventory.state.keys()):
        what = f"{_counted(extra, f'do not belong to {model}')}, such as {extra[0]}"
        if all(_FUSED_COPY.search(name) for name in extra):
            again = "it was saved after fuse_qkv_projections() and has q, k and v twice: load and save it in diffusers"
            return _Mismatch(what, extra[0], again)
        return _Mismatch(
            what,
            extra[0],
            "config.json belongs to a different model, or an adapter was saved into the weights",
        )
    for name, shape in inventory.state.items():
        if (found := source.tensors[name].shape) != shape:
            what = f"{name} has shape {list(found)}, but the config says {list(shape)}"
            return _Mismatch(what, name, "config.json belongs to a different model")
    return None


def _counted(names: list[str], what: str) -> str:
    if len(names) == 1:
        what = what.replace(" are ", " is ").replace("do not", "does not")
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'} {what}"


def _of_another_base(source: Source, inventory: Inventory, mismatch: _Mismatch) -> InputError:
    differing = differences(source.tensors, inventory.state)
    values = "; ".join(f"{name} is {here} here, but {there} in the base" for name, here, there in differing)
    return InputError(
        f"{source.path}: does not match the base {source.pipeline}: {values or mismatch.what}",
        hint=f"the base is a different variant{'' if values else ', or the file is incomplete'}; {BASE_HINT}",
        where=differing[0][0] if differing else mismatch.first,
        kind="wrong-base",
    )
