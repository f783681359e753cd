"""Plan every transformer and UNet class of diffusers from its default config, and write docs/families/classes.md.

`make classes`, a few minutes; a run that was stopped goes on where it stopped. No weights are read: a class is planned
from a bare config.json, as `svdq inspect` does.
What a plan makes of block layers is held against `EXPECTED`, which was read out of the classes' source: which of them
read one conditioning vector, or only modulate, and which choose experts or make the modulation of all blocks.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from svdq_cli.entrypoints.inspect import inspect_prepared
from svdq_cli.errors import SvdqError
from svdq_cli.planning.blocks import places_of
from svdq_cli.planning.structure import MAKES_CONDITIONS, ROUTER, STRUCTURAL
from svdq_cli.prepare.plan_warnings import kept_warnings
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import default_recipe
from svdq_cli.reports import InspectReport
from tools.class_results import Result, each_in_a_process, keep, known
from tools.model_class_facts import CONFIGS, EXPECTED

_DENOISER = re.compile("Transformer|UNet|UVit|DiT")
_OTHERS = ("MiniMaxMusic3RVQDepthDecoder", "MotionAdapter", "T5FilmDecoder")  # denoisers by other names


def classes() -> list[str]:
    """Every class of diffusers' models that is a denoiser, or a part of one with blocks of its own."""
    from diffusers import models

    named = [name for name in dir(models) if _DENOISER.search(name) and not re.search("ControlNet|Vae", name)]
    return sorted(name for name in (*named, *_OTHERS) if hasattr(getattr(models, name, None), "from_config"))


def planned(name: str, folder: Path) -> Result:
    """What the plan of a class is, from a bare config in `folder`."""
    path = folder / "config.json"
    path.write_text(json.dumps({"_class_name": name, **CONFIGS.get(name, {})}))
    try:
        prepared = prepare(default_recipe(str(path)))
    except SvdqError as error:
        said = f"{error.message}; {error.hint}" if error.hint else error.message
        return Result("none", note=said.removeprefix(f"{path}: ").removeprefix(f"{folder}: "))
    plan, report = prepared.plan, inspect_prepared(prepared)
    roles = Counter(layer.role for layer in report.layers)
    seen = "by names" if plan.by_names else "seen"
    return Result(
        seen if report.family == STRUCTURAL else f"family {report.family}",
        report.parameters,
        roles["w4a4"],
        roles["w4a16"],
        roles["kept"],
        tuple(wrong_in(name, report, plan.kept_because)),
        report.bytes.ratio,
        "; ".join((*prepared.source.warnings, *kept_warnings(plan, prepared.inventory))),
    )


def wrong_in(name: str, report: InspectReport, because: Mapping[str, str]) -> Iterator[str]:
    """Layers in blocks whose role is none that the class's source calls for. Kept for their size is no wrong choice.
    `because`: why layers are kept."""
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
        mistaken = because.get(layer.name) in (ROUTER, MAKES_CONDITIONS)
        if layer.role != wanted and (layer.role != "kept" or mistaken):
            yield f"{layer.name} is {layer.role}"


def _work(name: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return planned(name, Path(folder))


def _keep(name: str, found: Result | str) -> None:
    result = Result("none", note=found) if isinstance(found, str) else found
    plan = asdict(result)
    keep(name, **{key: plan[key] for key in plan if key not in ("data_free", "calibrated")})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="classes; all where none is named")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    given = parser.parse_args()
    run = None if given.names else "classes"
    failed = each_in_a_process(given.names or classes(), _work, _keep, jobs=given.jobs, run=run)
    return int(bool(failed) or any(each.wrong for each in known().values()))


if __name__ == "__main__":
    sys.exit(main())
