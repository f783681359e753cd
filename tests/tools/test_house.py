"""The tool that measures how the package is built."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest

from tools.house import House, measure


def house_of(folder: Path, sources: Mapping[str, str]) -> House:
    for name, text in sources.items():
        path = folder / "svdq_cli" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return measure(folder)


def test_rooms_are_folders_and_loose_modules_but_not_the_package_s_doors(tmp_path: Path):
    house = house_of(
        tmp_path,
        {
            "__init__.py": "import svdq_cli.solve.a",
            "__main__.py": "",
            "text.py": "",
            "solve/a.py": "",
            "solve/b.py": "",
        },
    )
    assert house.rooms == ["solve", "text"]
    assert house.loose_modules == ["text"]
    assert house.arrows == []


def test_an_arrow_counts_once_however_often_and_wherever_a_room_imports_another(tmp_path: Path):
    sources = {
        "text.py": "",
        "solve/a.py": "from svdq_cli.text import x\nimport svdq_cli.solve.b\n",
        "solve/b.py": "def late():\n    from svdq_cli import text\n",
    }
    assert house_of(tmp_path, sources).arrows == ["solve -> text"]


def test_rooms_that_reach_each_other_through_a_third_are_one_circle(tmp_path: Path):
    sources = {
        "a/m.py": "import svdq_cli.b.m",
        "b/m.py": "import svdq_cli.c.m",
        "c/m.py": "import svdq_cli.a.m\nimport svdq_cli.d",
        "d.py": "",
    }
    assert house_of(tmp_path, sources).circles == ["a, b, c"]


@pytest.mark.parametrize(
    ("docstring", "counted"),
    [
        ("The codes of a weight.", True),
        ("The codes (N, K) of a weight.", False),
        ("The scales (N, K / 64) of a weight.", False),
        ("Noise over signal, a scalar.", False),
        ("A tensor of any shape, rounded.", False),
        ("Between the bounds (low, high).", True),
    ],
)
def test_a_public_function_with_tensors_names_their_shape(tmp_path: Path, docstring: str, counted: bool):
    source = f'def codes(weight: Tensor | None, n: int) -> int:\n    """{docstring}"""\n'
    assert bool(house_of(tmp_path, {"a.py": source}).without_shapes) == counted


def test_private_functions_and_those_without_tensors_need_no_shape(tmp_path: Path):
    source = """
        def _codes(weight: Tensor) -> Tensor: ...
        def names(tensors: Mapping[str, Tensor]) -> list[str]: ...
        class _Hidden:
            def read(self) -> Tensor: ...
        def outer() -> None:
            def inner(weight: Tensor) -> None: ...
    """
    assert house_of(tmp_path, {"a.py": source}).without_shapes == []


def test_methods_take_the_shapes_of_their_class_or_of_the_protocol_that_they_meet(tmp_path: Path):
    source = '''
        class Rows(Protocol):
            def read(self) -> Tensor:
                """All rows (N, K)."""
        class Stored:
            """A tensor on disk."""
            def read(self) -> Tensor:
                return load()
        class Linear:
            """A layer: tokens (M, K) to (M, N)."""
            def forward(self, x: Tensor) -> Tensor:
                """The layer's output."""
        class Bare:
            def forward(self, x: Tensor) -> Tensor: ...
    '''
    assert house_of(tmp_path, {"a.py": source}).without_shapes == ["svdq_cli/a.py:14 forward"]


def test_a_function_is_long_beyond_sixty_lines(tmp_path: Path):
    sixty = "def a():\n" + "    x = 1\n" * 59
    house = house_of(tmp_path, {"a.py": sixty, "b.py": sixty + "    y = 2\n"})
    assert house.long_functions == ["svdq_cli/b.py:1 a (61)"]


@pytest.mark.parametrize(
    ("made", "counted"),
    [
        ("torch.zeros(2, 3)", True),
        ("torch.zeros(2, 3, dtype=torch.float32)", False),
        ("torch.linspace(0, 1, 5, device=x.device)", True),
        ("torch.full((2,), 0.5)", True),
        ("torch.full((2,), -8)", False),
        ("torch.full((2,), fill)", True),
        ("torch.tensor([1, -2] * 3)", False),
        ("torch.tensor([1, 2.0])", True),
        ("torch.tensor(LEVELS)", True),
        ("torch.tensor(sizes, dtype=torch.int64)", False),
        ("torch.arange(width)", False),
        ("torch.arange(0, 1, 0.1)", True),
        ("torch.randn(*shape, **how)", False),
        ("x.zeros(2)", False),
    ],
)
def test_a_tensor_of_torchs_default_dtype_is_counted(made: str, counted: bool, tmp_path: Path):
    house = house_of(tmp_path, {"solve/a.py": f"def make(x, fill, width, shape, how):\n    return {made}\n"})
    assert len(house.without_dtype) == counted
