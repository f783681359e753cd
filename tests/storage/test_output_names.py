"""Outputs whose names say something else than they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdq_cli.conversion.convert import convert
from svdq_cli.conversion.plan import predict
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Output, Quantization, default_recipe
from svdq_cli.storage.output_paths import name_warnings

CPU = RunOptions(device="cpu")


def test_only_unusual_names_are_spoken_of():
    named = [Path("a.safetensors"), Path("b.SAFETENSORS"), Path("folder")]
    assert name_warnings(named, folders=[False, False, True]) == ()
    file, folder = name_warnings([Path("a.nunchaku"), Path("x.safetensors")], folders=[False, True])
    assert file.startswith("a.nunchaku: programs find only files whose names end in .safetensors")
    assert folder.startswith("x.safetensors: will be a folder, for diffusers; --format names")


@pytest.mark.parametrize("fmt", ["nunchaku", "comfy", "comfy-core"])
def test_a_single_file_without_the_suffix_is_written_as_named_and_spoken_of_before(
    tiny_flux: Path, tmp_path: Path, fmt: str
):
    """In every such format alike, by the plan and by the conversion."""
    out = tmp_path / "flux-int4"
    recipe = default_recipe(
        str(tiny_flux),
        quantization=Quantization(effort="datafree", rank=16),
        outputs=(Output.model_validate({"format": fmt, "path": str(out)}),),
    )
    said = name_warnings([out], folders=[False])
    assert set(said) <= set(predict(recipe, options=CPU).warnings)
    assert set(said) <= set(convert(recipe, out, options=CPU).warnings)
    assert out.is_file()
