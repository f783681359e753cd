"""A format is its module and its name in `formats.NAMES`: who lists formats has that list, or is held to it here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from svdq_cli.families.layouts import LAYOUTS
from svdq_cli.formats import DEFAULT, NAMES, all_formats, contract
from svdq_cli.recipe import Output
from tests.formats.test_damage import PARTS

ROOT = Path(__file__).parents[2]


def test_every_module_of_a_format_is_registered_under_its_own_name():
    assert [fmt.name for fmt in all_formats()] == list(NAMES)
    folder = ROOT / "svdq_cli/formats"
    holding = {
        path.stem
        for path in folder.glob("*.py")
        if "\nFORMAT = " in path.read_text() and path.stem != "headers"
    }
    assert holding == {name.replace("-", "_") for name in NAMES}
    assert DEFAULT in NAMES


def test_recipes_take_exactly_these():
    validate = Output.model_validate
    assert [validate({"format": name}).format for name in NAMES] == list(NAMES)
    with pytest.raises(ValidationError, match="'nunchaku-lite'"):
        validate({"format": "another"})


def test_the_docs_have_a_row_and_a_page_for_each():
    docs = ROOT / "docs/formats"
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(([\w-]+\.md)\)", (docs / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(NAMES)
    assert [page for _, page in rows if not (docs / page).is_file()] == []


def test_damage_is_sought_in_every_format_that_holds_flux():
    flux = {layout.format for layout in LAYOUTS if layout.family == "flux"}
    assert PARTS.keys() == {fmt.name for fmt in all_formats() if fmt.own_names or fmt.name in flux}


def test_naming_the_formats_loads_no_torch():
    """The command line names them in its help, which has to be there at once."""
    program = "import sys; from svdq_cli.formats import NAMES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_operands_of_the_page_are_those_of_the_contract():
    def operands(text: str) -> list[str]:
        return re.findall(r"^\| .*\|$", text.partition("| operand |")[2].partition("\n\n")[0], re.MULTILINE)

    page = (ROOT / "docs/formats/README.md").read_text(encoding="utf-8")
    assert operands(page) == operands(contract.__doc__ or "")
    assert len(operands(page)) == 6
