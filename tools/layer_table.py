"""The tables of docs/families: every family from its file, its page and the ready recipes, and the layers of published
models from the family files and the published configs.

`python -m tools.layer_table` rewrites them; a test compares them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from svdq_cli.errors import InputError
from svdq_cli.families import MODULES, Family, family_named
from svdq_cli.formats import format_named
from svdq_cli.planning.plan import plan_model
from svdq_cli.recipe import load_recipe
from svdq_cli.records import Int4, Linear, ModelPlan
from svdq_cli.source import open_source
from svdq_cli.storage.resources import data_root

CONFIGS = Path(__file__).parents[1] / "tests" / "families" / "configs"
PAGES = Path(__file__).parents[1] / "docs" / "families"
_INDEX = re.compile(r"(<!-- families -->\n).*?(<!-- end of families -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- layers of (?P<model>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: layers at the same place of every block of a stack."""

    place: str
    layers: tuple[str, ...]
    role: str


def plan_of_config(model: str, *, of_lite: bool = False) -> ModelPlan:
    """The plan of a published config; `of_lite`: as nunchaku-lite can hold it."""
    lite = format_named("nunchaku-lite")
    return plan_model(
        open_source(CONFIGS / f"{model}.json"),
        precision=Int4(),
        rank=32,
        supports=lite.unsupported_reason if of_lite else lambda layer: None,
    )


def layer_table(model: str) -> str:
    """The Markdown table of one published model."""
    everything, lite = plan_of_config(model), lite_plan(model)
    linears = {layer.name: layer.linear for layer in everything.layers}
    in_lite = {layer.name for layer in lite.layers} if lite else set()
    lines = [
        "| where | layers | becomes | in → out | count | in `nunchaku-lite` |",
        "|---|---|---|---|---|---|",
    ]
    for row in _rows(family_named(everything.family)):
        found = [linear for name, linear in linears.items() if _is_at(name, row)]
        if found:
            lines.append(_line(row, found, sum(linear.name in in_lite for linear in found)))
    kept = ", ".join(
        f"`{pattern}`" for pattern in family_named(everything.family).keep if _kept(everything, pattern)
    )
    quantized = sum(linear.in_features * linear.out_features for linear in linears.values())
    share = f"{quantized / everything.parameters:.1%}"
    lines += [
        "",
        f"These stay at 16 bits: {kept}, and everything that is not a linear layer. "
        f"Of the {everything.parameters:,} parameters of {model}, {share} become 4-bit.",
    ]
    return "\n".join(lines) + "\n"


def lite_plan(model: str) -> ModelPlan | None:
    """The plan in nunchaku-lite; None for a model of which that format can hold no layer."""
    try:
        return plan_of_config(model, of_lite=True)
    except InputError:
        return None


def rewritten(page: str) -> str:
    """A page with every table in it written anew."""
    page = _INDEX.sub(lambda found: f"{found[1]}{family_table()}{found[2]}", page)
    return _TABLE.sub(lambda found: f"{found[1]}{layer_table(found['model'])}{found[3]}", page)


def family_table() -> str:
    """The Markdown table of every family. A page has the name of its file of families, a recipe its precision last."""
    recipes: dict[str, dict[str, None]] = {}
    for path in sorted(data_root("configs").glob("*.yaml")):
        name = path.stem.rpartition("-")[0]
        recipes.setdefault(load_recipe(path).model.family or "", {})[f"`{name}-*`"] = None
    lines = ["| family | models | recipes in `configs/` |", "|---|---|---|"]
    for module, families in MODULES.items():
        page = f"{module.replace('_', '-')}.md"
        for family in families:
            ready = ", ".join(recipes.get(family.name, ()))
            lines.append(f"| [{family.name}]({page}) | {family.models} | {ready} |")
    return "\n".join(lines) + "\n"


def _rows(family: Family) -> list[Row]:
    rows: list[Row] = []
    for block in family.blocks:
        for rule in block.w4a4:
            shared = " (one input, one branch)" if len(rule.branches) == 1 else " (one input)"
            rows.append(
                Row(f"{block.stack}.*", rule.layers, "W4A4" + (shared if len(rule.layers) > 1 else ""))
            )
        if block.w4a16:
            rows.append(Row(f"{block.stack}.*", block.w4a16, "W4A16"))
    if family.w4a16:
        rows.append(Row("", family.w4a16, "W4A16"))
    return rows


def _is_at(name: str, row: Row) -> bool:
    depth = row.place.count(".") + 1 if row.place else 0
    parts = name.split(".")
    return ".".join(parts[depth:]) in row.layers and fnmatchcase(".".join(parts[:depth]), row.place)


def _line(row: Row, found: list[Linear], in_lite: int) -> str:
    sizes = dict.fromkeys(f"{linear.in_features} → {linear.out_features}" for linear in found)
    kind = ", 1x1 convolution" if found[0].kind == "conv1x1" else ""
    lite = "yes" if in_lite == len(found) else f"{in_lite} of {len(found)}" if in_lite else "16 bit"
    layers = ", ".join(f"`{layer}`" for layer in row.layers)
    place = f"`{row.place}`" if row.place else "outside"
    return f"| {place} | {layers} | {row.role}{kind} | {', '.join(sizes)} | {len(found)} | {lite} |"


def _kept(plan: ModelPlan, pattern: str) -> bool:
    return any(fnmatchcase(linear.name, pattern) for linear in plan.kept)


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
