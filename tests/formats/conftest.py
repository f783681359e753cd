"""One tiny model, converted once per precision to every format that can say it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def converted_flux(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By precision, a folder that holds `lite/` and one `FORMAT.safetensors` for each other format."""
    from svdq_cli.pipeline import convert
    from svdq_cli.preparing import RunOptions
    from svdq_cli.recipe import Output, Quantization, default_recipe

    made: dict[str, Path] = {}

    def of(precision: str) -> Path:
        if precision not in made:
            folder = tmp_path_factory.mktemp(precision)
            names = ("nunchaku", "comfy") if precision == "int4" else ("nunchaku",)
            paths = {"nunchaku-lite": folder / "lite"}
            paths |= {name: folder / f"{name}.safetensors" for name in names}
            recipe = default_recipe(
                str(tiny_flux),
                quantization=Quantization.model_validate(
                    {"precision": precision, "rank": 16, "effort": "datafree"}
                ),
                outputs=[Output.model_validate({"format": n, "path": str(p)}) for n, p in paths.items()],
            )
            convert(recipe, tuple(paths.values()), options=RunOptions(device="cpu"))
            made[precision] = folder
        return made[precision]

    return of
