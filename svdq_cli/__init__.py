"""svdq converts diffusion models to 4-bit SVDQuant checkpoints.

    import svdq_cli

    svdq_cli.convert("path/to/FLUX.1-dev", "flux-int4", prompts="calib_prompts/general.txt")
    pipe = svdq_cli.load_pipeline("flux-int4")

Importing the package is cheap: torch and diffusers are imported by the first function that needs them.
docs/python-api.md describes every function.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdq_cli.entrypoints.python_api import calibrate, check, convert, evaluate, export, fold_lora
    from svdq_cli.inference.load import load_pipeline
    from svdq_cli.lora.attach import load_lora, set_adapters, unload_lora
    from svdq_cli.recipe import Lora, Recipe, load_recipe

__version__ = "0.1.0"
__all__ = [
    "Lora",
    "Recipe",
    "__version__",
    "calibrate",
    "check",
    "convert",
    "evaluate",
    "export",
    "fold_lora",
    "load_lora",
    "load_pipeline",
    "load_recipe",
    "set_adapters",
    "unload_lora",
]

_HOMES = {
    "svdq_cli.entrypoints.python_api": (
        "calibrate",
        "check",
        "convert",
        "evaluate",
        "export",
        "fold_lora",
    ),
    "svdq_cli.inference.load": ("load_pipeline",),
    "svdq_cli.lora.attach": ("load_lora", "set_adapters", "unload_lora"),
    "svdq_cli.recipe": ("Lora", "Recipe", "load_recipe"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if home := _HOME_OF.get(name):
        return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
