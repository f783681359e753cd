"""The table of rooms in docs/architecture.md, from pyproject.toml's floors and the folders' docstrings.

`python -m tools.rooms` rewrites it; a test compares.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
PACKAGE = ROOT / "svdq_cli"
_TABLE = re.compile(r"(<!-- rooms -->\n).*?(<!-- end of rooms -->)", re.DOTALL)


def floors() -> list[list[str]]:
    """The rooms of each floor, the highest floor first, as import-linter holds them."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contract = project.split('name = "a module imports only from lower floors"')[1]
    layers = re.search(r"layers = \[\n(.*?)\n\]", contract, re.DOTALL)
    assert layers is not None
    return [floor.split(" | ") for floor in re.findall(r'"(.*?)"', layers[1])]


def purpose(room: str) -> str:
    """The first sentence of a room's docstring. Raises ValueError for a room that says nothing."""
    folder, module = PACKAGE / room / "__init__.py", PACKAGE / f"{room}.py"
    text = ast.get_docstring(ast.parse((folder if folder.exists() else module).read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"svdq_cli/{room}: a room says in its docstring what it is for")
    return re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]


def table() -> str:
    """The rooms as Markdown, one row each, with the number of their floor from below."""
    rows = ["| floor | room | what it is for |", "|---|---|---|"]
    height = len(floors())
    for index, floor in enumerate(floors()):
        for room in floor:
            name = f"`{room}/`" if (PACKAGE / room).is_dir() else f"`{room}.py`"
            rows.append(f"| {height - index} | {name} | {purpose(room)} |")
    return "\n".join(rows) + "\n"


def rewritten(page: str) -> str:
    """The page with the table as it should be."""
    return _TABLE.sub(lambda found: found[1] + table() + found[2], page)


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
