"""Whether the source's tensors are those of the model that its config describes, and who is to blame if not."""

from __future__ import annotations

from dataclasses import dataclass

from svdq_cli.errors import InputError
from svdq_cli.planning.inventory import Inventory
from svdq_cli.source import Source
from svdq_cli.source.configs import differences
from svdq_cli.source.single_file import BASE_HINT


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
                f"{where}: a variant of {inventory.model_class} whose config can't be told from names and shapes "
                f"({mismatch.what})",
                hint=BASE_HINT,
                where=mismatch.first,
                kind="needs-base",
            )


def _mismatch(source: Source, inventory: Inventory) -> _Mismatch | None:
    model = inventory.model_class
    if missing := [name for name in inventory.state if name not in source.tensors]:
        return _Mismatch(
            f"{_counted(missing, f'of {model} are missing')}, the first is {missing[0]}",
            missing[0],
            "the download is incomplete or config.json belongs to another model",
        )
    if extra := sorted(source.tensors.keys() - inventory.state.keys()):
        return _Mismatch(
            f"{_counted(extra, f'do not belong to {model}')}, the first is {extra[0]}",
            extra[0],
            "config.json belongs to another model, or an adapter was saved into the weights",
        )
    for name, shape in inventory.state.items():
        if (found := source.tensors[name].shape) != shape:
            what = f"{name} has shape {list(found)}, the config says {list(shape)}"
            return _Mismatch(what, name, "config.json belongs to another model")
    return None


def _counted(names: list[str], what: str) -> str:
    if len(names) == 1:
        what = what.replace(" are ", " is ").replace("do not", "does not")
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'} {what}"


def _of_another_base(source: Source, inventory: Inventory, mismatch: _Mismatch) -> InputError:
    differing = differences(source.tensors, inventory.state)
    values = "; ".join(f"{name} is {here} here and {there} in the base" for name, here, there in differing)
    return InputError(
        f"{source.path}: not the model of the base {source.pipeline}: {values or mismatch.what}",
        hint=f"the base is another variant{'' if values else ', or the file is incomplete'}; {BASE_HINT}",
        where=differing[0][0] if differing else mismatch.first,
        kind="wrong-base",
    )
