"""svdq converts diffusion models to 4-bit SVDQuant checkpoints.

    import svdq_cli
    pipeline = svdq_cli.load_pipeline("out/flux1-dev-int4")

Importing the package is cheap: torch and diffusers are imported by the first name that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdq_cli.inference.load import load_pipeline
    from svdq_cli.lora.attach import load_lora, set_adapters, unload_lora

__version__ = "0.1.0"
__all__ = ["__version__", "load_lora", "load_pipeline", "set_adapters", "unload_lora"]


def __getattr__(name: str) -> object:
    if name == "load_pipeline":
        from svdq_cli.inference.load import load_pipeline

        return load_pipeline
    if name in ("load_lora", "set_adapters", "unload_lora"):
        from svdq_cli.lora import attach

        return getattr(attach, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
