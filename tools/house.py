"""Measures how the package is built, and fails where a number has grown: `python -m tools.house` (in `make lint`).

A room is a folder of the package, or a module that lies beside them. An arrow goes from one room to another that it
imports, anywhere in the code. A circle is a set of rooms that all reach each other. A function is long beyond 60 lines,
its signature and docstring included. A public function or method that takes or returns a tensor names shapes in its
docstring, or its class does, or, where it has no docstring, the Protocol whose method it is: letters or numbers in
parentheses such as `(M, K)`, or the words "any shape" or "scalar".

A tensor is made with its dtype: without one, torch takes its default dtype, which loading a model changes for every
thread of the process for a while.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGE = "svdq_cli"
LONGEST = 60

# The most that each number may be. A change that lowers one writes it here; one that raises it says why.
LIMITS = {
    "loose_modules": 4,
    "rooms": 33,  # with metrics/, below recipe/, whose gates speak of every metric; and experimental/
    # One more since rooms take their files from storage/, where each wrote them in its own way; four more since their
    # messages count in words by text.counted ("1 tensor", "2 tensors")
    "arrows": 236,
    "circles": 0,
    # convert and evaluate of the Python API, whose signatures and docstrings take most of it, and the command convert
    "long_functions": 2,
    "without_shapes": 0,
    "without_dtype": 0,
}
TITLES = {
    "loose_modules": "modules at the package's top",
    "rooms": "rooms",
    "arrows": "import arrows between rooms",
    "circles": "circles of rooms",
    "long_functions": f"functions over {LONGEST} lines",
    "without_shapes": "public functions with tensors and no shape in the docstring",
    "without_dtype": "tensors made in torch's default dtype",
}

# Of torch, what makes tensors in its default dtype: always, or where the numbers that it is given are no integers
_FLOATING = frozenset(["zeros", "ones", "empty", "eye", "rand", "randn", "linspace", "logspace", "normal"])
_OF_NUMBERS = {"full": 1, "tensor": 0}  # where the numbers are among the arguments

_AXES = "batch|blocks|bytes|channels|columns|frames|heads|height|layers|prompts|rows|samples|splits|steps|tokens|width"
_FIRST = rf"(?:\.\.\.|n(?=,)|sum of N|\*|[A-Z][\w']{{0,2}}|\d+|{_AXES})"
_SHAPE = re.compile(rf"\({_FIRST}(?:\s*[-+*/]+\s*[\w']+)*,[\w\s.,'*/+()-]*\)|\b[Aa]ny\s+shape\b|\bscalar\b")


@dataclass(frozen=True, slots=True)
class House:
    """What was counted. Functions are "path:line name (lines)"."""

    loose_modules: list[str]
    rooms: list[str]
    arrows: list[str]
    circles: list[str]
    long_functions: list[str]
    without_shapes: list[str]
    without_dtype: list[str]
    tensor_functions: int
    modules: int
    lines: int


def measure(root: Path) -> House:
    """The numbers of the package below `root`, a checkout of the repository."""
    package = root / PACKAGE
    sources = {path.relative_to(package): path.read_text("utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    # The package's own __init__ and __main__ only hand out names: they are doors, not rooms.
    own = {path: tree for path, tree in trees.items() if not str(path).startswith("__")}
    rooms = sorted({_room(path) for path in own})
    arrows = {(_room(path), target) for path, tree in own.items() for target in _imports(tree, rooms)}
    arrows = {(source, target) for source, target in arrows if source != target}
    functions = {path: tuple(_functions(tree)) for path, tree in trees.items()}
    contracts = {
        found.node.name
        for every in functions.values()
        for found in every
        if found.of_protocol and _SHAPE.search(found.docstring)
    }
    long_functions: list[str] = []
    without_shapes: list[str] = []
    tensor_functions = 0
    for path, every in functions.items():
        for found in every:
            node = found.node
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            place = f"{PACKAGE}/{path.as_posix()}:{node.lineno} {node.name}"
            if lines > LONGEST:
                long_functions.append(f"{place} ({lines})")
            if found.public and _has_tensors(node):
                tensor_functions += 1
                inherits = not found.docstring and found.of_class and node.name in contracts
                if not inherits and not _SHAPE.search(found.docstring + found.of_class):
                    without_shapes.append(place)
    return House(
        loose_modules=[
            path.stem for path in sources if len(path.parts) == 1 and not path.stem.startswith("__")
        ],
        rooms=rooms,
        arrows=[f"{source} -> {target}" for source, target in sorted(arrows)],
        circles=_circles(rooms, arrows),
        long_functions=long_functions,
        without_shapes=without_shapes,
        without_dtype=[
            f"{PACKAGE}/{path.as_posix()}:{call.lineno} {ast.unparse(call.func)}"
            for path, tree in trees.items()
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and _follows_default_dtype(call)
        ],
        tensor_functions=tensor_functions,
        modules=len(sources),
        lines=sum(text.count("\n") for text in sources.values()),
    )


def _follows_default_dtype(call: ast.Call) -> bool:
    """Whether a call makes a tensor whose dtype is torch's default, or may be."""
    function = call.func
    if not isinstance(function, ast.Attribute) or ast.unparse(function.value) != "torch":
        return False
    if any(keyword.arg in ("dtype", None) for keyword in call.keywords):
        return False
    if function.attr in _FLOATING:
        return True
    if function.attr == "arange":
        return any(_is_fraction(node) for argument in call.args for node in ast.walk(argument))
    at = _OF_NUMBERS.get(function.attr)
    if at is None or len(call.args) <= at:
        return at is not None
    # of a name nobody can tell
    return not all(_is_integer(node) for node in ast.walk(call.args[at]))


def _is_fraction(node: ast.AST) -> bool:
    return isinstance(node, ast.Div) or (isinstance(node, ast.Constant) and isinstance(node.value, float))


def _is_integer(node: ast.AST) -> bool:
    """Whether a node is part of an expression of integers that are written out."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int)
    written = (ast.List, ast.Tuple, ast.UnaryOp, ast.USub, ast.BinOp, ast.Mult, ast.Add, ast.Sub, ast.Load)
    return isinstance(node, written)


def _room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _imports(tree: ast.Module, rooms: list[str]) -> Iterator[str]:
    """Rooms that a module imports; the package has no relative imports (ruff holds it to that)."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in rooms:
                yield parts[1]


def _circles(rooms: list[str], arrows: set[tuple[str, str]]) -> list[str]:
    """Sets of rooms that reach each other, as "a, b"."""
    reach = {room: {target for source, target in arrows if source == room} for room in rooms}
    for middle in rooms:
        for room in rooms:
            if middle in reach[room]:
                reach[room] |= reach[middle]
    sets = {
        frozenset(other for other in rooms if other in reach[room] and room in reach[other]) for room in rooms
    }
    return sorted(", ".join(sorted(found)) for found in sets if found)


Node = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Function:
    """A function, and the class around it. `public`: it and its class have public names, and no function holds it."""

    node: Node
    public: bool
    docstring: str
    of_class: str  # the docstring of its class, or that there is none; empty outside of classes
    of_protocol: bool


def _functions(tree: ast.Module) -> Iterator[Function]:
    pending: list[tuple[ast.AST, bool, ast.ClassDef | None]] = [(tree, True, None)]
    while pending:
        around, seen, owner = pending.pop()
        for child in ast.iter_child_nodes(around):
            if isinstance(child, Node):
                of_class = (ast.get_docstring(owner) or "no docstring") if owner else ""
                protocol = owner is not None and any("Protocol" in ast.unparse(base) for base in owner.bases)
                public = seen and not child.name.startswith("_")
                yield Function(child, public, ast.get_docstring(child) or "", of_class, protocol)
                pending.append((child, False, None))
            elif isinstance(child, ast.ClassDef):
                pending.append((child, seen and not child.name.startswith("_"), child))
            else:
                pending.append((child, seen, owner))


def _has_tensors(function: Node) -> bool:
    """Whether a parameter or the result is a tensor, an optional one or a tuple of some. Tensors by name in a mapping,
    and callables, are other things."""
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return any(_is_tensor(note) for note in (*(argument.annotation for argument in every), function.returns))


def _is_tensor(note: ast.expr | None) -> bool:
    match note:
        case ast.Name(id="Tensor") | ast.Attribute(attr="Tensor"):
            return True
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _is_tensor(left) or _is_tensor(right)
        case ast.Subscript(value=ast.Name(id="tuple" | "list"), slice=ast.Tuple(elts=parts)):
            return any(_is_tensor(part) for part in parts)
        case ast.Subscript(
            value=ast.Name(id="tuple" | "list" | "Sequence" | "Iterator" | "Iterable"), slice=part
        ):
            return _is_tensor(part)
        case _:
            return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parent.parent, help="a checkout")
    parser.add_argument("--json", action="store_true", help="everything that was counted, as JSON")
    parser.add_argument("--list", choices=tuple(TITLES), help="what one number counts, a line each")
    options = parser.parse_args()
    house = measure(options.root)
    counts = {key: len(getattr(house, key)) for key in TITLES}
    grown = [key for key, count in counts.items() if count > LIMITS[key]]
    if options.json:
        print(json.dumps({"counts": counts, "limits": LIMITS, "grown": grown, **asdict(house)}, indent=1))
    elif options.list:
        print("\n".join(getattr(house, options.list)))
    else:
        for key, title in TITLES.items():
            print(f"{title:<62}{counts[key]:>5}   at most {LIMITS[key]}")
        print(
            f"{house.modules} modules, {house.lines} lines, {house.tensor_functions} public functions with tensors"
        )
    for key in grown:
        print(f"house: {TITLES[key]}: {counts[key]}, more than {LIMITS[key]}", file=sys.stderr)
        print(f"  what they are: python -m tools.house --list {key}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
