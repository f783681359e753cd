"""Plan every transformer and UNet class of diffusers from its default config, and write docs/families/classes.md.

`make classes`, a few minutes. No weights are read: a class is planned from a bare config.json, as `svdq inspect` does.
What a plan makes of block layers is held against `EXPECTED`, which was read out of the classes' source: which of them
read one conditioning vector, or only modulate, and which choose experts or make the modulation of all blocks.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from svdq_cli.entrypoints.inspect import inspect_prepared
from svdq_cli.errors import SvdqError
from svdq_cli.planning.blocks import places_of
from svdq_cli.planning.structure import STRUCTURAL
from svdq_cli.prepare.plan_warnings import kept_warnings
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import default_recipe
from svdq_cli.reports import InspectReport
from tools.class_conversions import Conversions, known
from tools.model_class_facts import CONFIGS, EXPECTED

PAGE = Path(__file__).parents[1] / "docs/families/classes.md"


@dataclass(frozen=True, slots=True)
class Row:
    """A class and what became of it."""

    name: str
    note: str
    report: InspectReport | None = None
    by_names: bool = False  # no forward pass showed what its layers are
    wrong: tuple[str, ...] = ()

    @property
    def plan(self) -> str:
        if self.report is None:
            return "none"
        if self.report.family != STRUCTURAL:
            return f"family {self.report.family}"
        return "by names" if self.by_names else "seen"


_DENOISER = re.compile("Transformer|UNet|UVit|DiT")
_OTHERS = ("MiniMaxMusic3RVQDepthDecoder", "MotionAdapter", "T5FilmDecoder")  # denoisers by other names


def classes() -> list[str]:
    """Every class of diffusers' models that is a denoiser, or a part of one with blocks of its own."""
    from diffusers import models

    named = [name for name in dir(models) if _DENOISER.search(name) and not re.search("ControlNet|Vae", name)]
    return sorted(name for name in (*named, *_OTHERS) if hasattr(getattr(models, name, None), "from_config"))


def row_of(name: str, folder: Path) -> Row:
    path = folder / "config.json"
    path.write_text(json.dumps({"_class_name": name, **CONFIGS.get(name, {})}))
    try:
        prepared = prepare(default_recipe(str(path)))
    except SvdqError as error:
        said = f"{error.message}; {error.hint}" if error.hint else error.message
        return Row(name, said.removeprefix(f"{path}: ").removeprefix(f"{folder}: "))
    notes = (*prepared.source.warnings, *kept_warnings(prepared.plan, prepared.inventory))
    report = inspect_prepared(prepared)
    return Row(name, "; ".join(notes), report, prepared.plan.by_names, tuple(wrong_in(name, report)))


def wrong_in(name: str, report: InspectReport) -> Iterator[str]:
    """Layers in blocks whose role is none that the class's source calls for. Kept for their size is no wrong choice."""
    expected: Mapping[str, tuple[str, ...]] = EXPECTED.get(name, {})
    places = places_of([layer.name for layer in report.layers])
    for layer in report.layers:
        if not places[layer.name].stack:
            continue
        wanted = next(
            (
                role
                for role, patterns in expected.items()
                if any(fnmatchcase(layer.name, p) for p in patterns)
            ),
            "w4a4",
        )
        if layer.role not in (wanted, "kept"):
            yield f"{layer.name} is {layer.role}"


def page(rows: list[Row], version: str) -> str:
    found = known()
    planned = [row for row in rows if row.report]
    seen = sum(row.plan == "seen" for row in rows)
    families = sum(row.plan.startswith("family") for row in rows)
    wrong = sum(len(row.wrong) for row in rows)
    lines = [
        "# Every class of diffusers",
        "",
        f"All {len(rows)} transformer and UNet classes of diffusers {version} with their default config (where it "
        "lacks values, those of a published model), planned from a bare `config.json` for int4, rank 32, format "
        f"`nunchaku-lite`. {seen} plans were seen in a forward pass, {families} follow a family file, "
        f"{len(planned) - seen - families} rest on names alone, {len(rows) - len(planned)} classes are refused. "
        f"Wrong choices: {wrong}.",
        "",
        "Written by `make classes`. *Wrong* counts layers of blocks whose role is not the one that the class's source "
        "calls for (`tools/model_class_facts.py`); the note says what stays at 16 bits, as `svdq inspect` does.",
        "",
        "*Data-free* and *calibrated* are what `make pipelines` found: a small model of the class with random weights "
        f"was converted without calibration and checked ({_ok(found, 'data_free')} of {len(rows)}); a tiny pipeline of "
        f"it was calibrated, converted, checked, and has generated ({_ok(found, 'calibrated')}; nothing stands where "
        "no tiny pipeline was made).",
        "",
        "| class | plan | B params | W4A4 / W4A16 / kept | wrong | ratio | data-free | calibrated | note |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(row, found.get(row.name, Conversions())) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _ok(found: Mapping[str, Conversions], what: str) -> int:
    return sum(getattr(each, what) == "ok" for each in found.values())


def _line(row: Row, found: Conversions) -> str:
    note = row.note.replace("|", "\\|")
    if row.report is None:
        return f"| {row.name} | none | | | | | | | refused: {note} |"
    roles = [layer.role for layer in row.report.layers]
    counts = " / ".join(str(roles.count(role)) for role in ("w4a4", "w4a16", "kept"))
    shown = "; ".join([*row.wrong[:2], note] if row.wrong else [note])
    return (
        f"| {row.name} | {row.plan} | {row.report.parameters / 1e9:.2f} | {counts} | {len(row.wrong)} "
        f"| {row.report.bytes.ratio:.2f} | {found.data_free} | {found.calibrated} | {shown} |"
    )


def main(names: list[str]) -> None:
    import diffusers

    rows: list[Row] = []
    for name in names or classes():
        with tempfile.TemporaryDirectory() as folder:
            row = row_of(name, Path(folder))
        print(row.name, row.plan, len(row.wrong), *row.wrong[:3], file=sys.stderr, flush=True)
        rows.append(row)
    text = page(rows, diffusers.__version__)
    if names:
        print(text)
    else:
        PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
