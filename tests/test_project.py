"""What ships: the version, the light import, the ready recipes and the prompt lists."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import svdq_cli
from svdq_cli.recipe import find_prompts, load_recipe
from svdq_cli.storage.resources import data_root

CONFIGS = sorted(data_root("configs").glob("*.yaml"))


def test_the_package_and_the_distribution_agree_on_the_version():
    try:
        installed = importlib.metadata.version("svdq")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("svdq runs from a folder that is not installed: needs `make setup`")
    assert installed == svdq_cli.__version__


def test_importing_svdq_imports_neither_torch_nor_diffusers():
    program = (
        "import sys, svdq_cli; sys.exit(bool({'torch', 'diffusers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="lod_pipeline"):
        _ = svdq_cli.lod_pipeline  # type: ignore[attr-defined]


def test_the_package_ships_its_types():
    """Without this file, type checkers of those who use svdq take every name for unknown (PEP 561)."""
    assert (Path(svdq_cli.__file__).parent / "py.typed").is_file()


def test_there_are_ready_recipes():
    assert {"demo-int4", "demo-nvfp4", "flux1-dev-int4"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_ready_recipe_loads_and_is_named_after_what_it_makes(path: Path):
    recipe = load_recipe(path)
    family, _, precision = path.stem.rpartition("-")
    assert recipe.quantization.precision == precision
    assert [output.path for output in recipe.outputs] == [f"out/{family}-{precision}"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_prompts_of_every_ready_recipe_ship_with_svdq(path: Path):
    calibration = load_recipe(path).calibration
    assert calibration is not None
    assert isinstance(calibration.prompts, str)
    prompts = find_prompts(calibration.prompts, path.parent).read_text(encoding="utf-8").splitlines()
    assert len(prompts) >= (calibration.samples or 1)


@pytest.mark.parametrize("path", sorted(data_root("calib_prompts").glob("*.txt")), ids=lambda path: path.stem)
def test_a_prompt_list_has_one_prompt_a_line_and_none_twice(path: Path):
    prompts = path.read_text(encoding="utf-8").splitlines()
    assert all(prompt and prompt == prompt.strip() for prompt in prompts)
    assert len(set(prompts)) == len(prompts)


def test_every_prompt_list_says_how_it_was_made():
    folder = data_root("calib_prompts")
    told = (folder / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in folder.glob("*.txt") if f"`{path.name}`" not in told] == []


def test_the_kernels_folder_is_no_python_package():
    """A package named `kernels` would shadow the one that diffusers imports."""
    assert not (data_root("kernels") / "__init__.py").exists()
