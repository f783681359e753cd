"""A pipeline as one DDUF file: its denoiser is read where it lies, exactly as from the folder."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import export_folder_as_dduf
from safetensors.torch import load_file, save_file

from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError
from svdq_cli.recipe import default_recipe, with_overrides
from svdq_cli.source import Source, open_source, read_tensor, source_digest
from tests.source.test_shards import write_shards
from tests.tiny_families import tiny_pipeline

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def dduf(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dduf") / "flux.dduf"
    export_folder_as_dduf(path, tiny_flux)
    return path


def test_it_is_the_same_model_as_its_folder(dduf: Path, tiny_flux: Path, tmp_path: Path):
    assert source_digest(open_source(dduf)) == source_digest(open_source(tiny_flux))
    made: list[bytes] = []
    for name, source, base in (("file", dduf, str(tiny_flux)), ("folder", tiny_flux, None)):
        recipe = with_overrides(
            default_recipe(str(source)),
            {"quantization.effort": "datafree", "quantization.rank": 16, "model.base": base},
        )
        convert(recipe, tmp_path / name)
        made.append((tmp_path / name / WEIGHTS).read_bytes())
    assert made[0] == made[1]


def test_the_warning_says_where_the_other_parts_come_from(dduf: Path, tiny_flux: Path):
    (alone,), (based,) = open_source(dduf).warnings, open_source(dduf, base=tiny_flux).warnings
    assert "text_encoder_2" in alone
    assert "are left out" in alone
    assert "unzip flux.dduf -d flux" in alone
    assert f"come from {tiny_flux}" in based


def test_shards_in_it_are_one_model(tiny_flux: Path, tiny_flux_copy: Path, tmp_path: Path):
    write_shards(tiny_flux_copy / "transformer", load_file(tiny_flux_copy / WEIGHTS))
    (tiny_flux_copy / WEIGHTS).unlink()
    export_folder_as_dduf(tmp_path / "sharded.dduf", tiny_flux_copy)
    assert source_digest(open_source(tmp_path / "sharded.dduf")) == source_digest(open_source(tiny_flux))


@pytest.mark.parametrize("word", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "dduf"])
def test_scaled_float8_is_read_times_its_scales(
    word: str, packed: bool, tiny_flux: Path, tiny_flux_copy: Path, tmp_path: Path
):
    """ComfyUI's fp8_scaled under diffusers' names: a scale a matrix, and a key that says so."""
    original = load_file(tiny_flux / WEIGHTS)
    eight = [name for name, x in original.items() if x.ndim == 2 and "transformer_blocks" in name]
    scales = {name: original[name].float().abs().max() / 448 for name in eight}
    stored = {
        **original,
        **{name: (original[name].float() / scale).to(torch.float8_e4m3fn) for name, scale in scales.items()},
        **{f"{name.removesuffix('weight')}{word}": scale for name, scale in scales.items()},
        f"{eight[0].removesuffix('weight')}scale_input": torch.tensor(1.0),
        "scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn),
    }

    def opened() -> Source:
        save_file(stored, tiny_flux_copy / WEIGHTS)
        if packed:
            export_folder_as_dduf(tmp_path / "flux.dduf", tiny_flux_copy)
        return open_source(tmp_path / "flux.dduf" if packed else tiny_flux_copy)

    source = opened()
    assert source.tensors.keys() == original.keys()
    for name in eight:
        # half a step of three bits of mantissa, and of the smallest numbers of 448
        torch.testing.assert_close(
            read_tensor(source, name).float(),
            original[name].float(),
            rtol=2**-4 + 2**-8,
            atol=2**-10 * scales[name].item() * 1.01,
        )
    assert f"{len(eight)} of them times their scale" in str(source.warnings)
    del stored[f"{eight[0].removesuffix('weight')}{word}"]
    (tmp_path / "flux.dduf").unlink(missing_ok=True)
    assert f"1 of {len(eight)} matrices have none" in str(opened().warnings)


def test_it_is_told_by_its_content_whatever_it_is_called(dduf: Path, tiny_flux: Path, tmp_path: Path):
    shutil.copy(dduf, tmp_path / "flux.zip")
    assert source_digest(open_source(tmp_path / "flux.zip")) == source_digest(open_source(tiny_flux))


def test_a_zipped_pickle_stays_a_pickle(tmp_path: Path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        open_source(tmp_path / "model.safetensors")
    assert error.value.kind == "pickle"


def test_a_damaged_file_is_called_that(dduf: Path, tmp_path: Path):
    cut = tmp_path / "cut.dduf"
    cut.write_bytes(dduf.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a readable DDUF file") as error:
        open_source(cut)
    assert error.value.kind == "damaged-file"


def test_a_compressed_archive_is_no_dduf_file(dduf: Path, tmp_path: Path):
    squeezed = tmp_path / "squeezed.dduf"
    with zipfile.ZipFile(dduf) as old, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(InputError, match="must not be compressed"):
        open_source(squeezed)


def test_the_base_of_another_model_is_refused(dduf: Path, tmp_path: Path):
    base = tiny_pipeline("sd3", tmp_path / "sd3")
    with pytest.raises(InputError, match=r"FluxTransformer2DModel.*SD3Transformer2DModel") as error:
        open_source(dduf, base=base)
    assert error.value.kind == "wrong-base"
