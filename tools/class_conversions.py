"""Convert every class of diffusers, and keep what came of it for docs/families/classes.md.

`make pipelines`, a nightly target. Without calibration: a small model of each class with random weights. With
calibration: every pipeline of `tests/tiny_pipelines`, from its prompts to an image. Each has a process of its own;
a run that was stopped goes on where it stopped. Pipelines whose processors need torchvision are left out where it is
not installed (`pip install torchvision`, of the release that belongs to the torch here): what was found of them stays.
Exit code 1 where one fails that is not refused for its sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.prepare.options import RunOptions
from svdq_cli.recipe import Quantization, Recipe, default_recipe
from svdq_cli.source import open_source
from svdq_cli.source.classes import model_class
from tests.tiny_pipelines import PIPELINES, is_possible, round_trip
from tools.class_results import Result, each_in_a_process, keep, known
from tools.model_class_sizes import small_config
from tools.model_classes import classes


def data_free(name: str, folder: Path) -> str:
    """A small model of the class, converted without calibration and checked."""
    torch.manual_seed(0)
    config = json.loads(json.dumps(small_config(name)))
    model = model_class(name, where=name).from_config(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if not bool(parameter.isfinite().all()) or not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    source, out = folder / "source", folder / "out"
    model.save_pretrained(source)
    report = convert(_recipe(source), out, options=RunOptions(device="cpu"))
    found = check(out, against=open_source(source)).status
    return "ok" if (report.status, found) == ("ok", "ok") else f"convert: {report.status}, check: {found}"


def _recipe(source: Path) -> Recipe:
    wanted = {"effort": "datafree", "rank": 16, "refinements": 0}
    return default_recipe(str(source), quantization=Quantization.model_validate(wanted))


def _work(name: str) -> tuple[str, str]:
    """The class of a denoiser, and what became of it; `name` is a class or a tiny pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        return (
            (name, data_free(name, Path(folder)))
            if name not in PIPELINES
            else _round_trip(name, Path(folder))
        )


def _round_trip(name: str, folder: Path) -> tuple[str, str]:
    try:
        report = round_trip(name, folder)
        return report.model.model_class, report.status
    except Exception as error:
        traceback.print_exc()
        said = " ".join(str(error).replace(f"{folder}/", "").split())
        of_class = open_source(folder / "source").config["_class_name"]
        return str(of_class), f"{type(error).__name__}: {said}"


def _keep(name: str, found: tuple[str, str] | str) -> None:
    if name not in PIPELINES:
        keep(name, data_free=found if isinstance(found, str) else found[1])
    elif not isinstance(found, str):
        of_class, said = found
        before = known().get(of_class, Result()).calibrated
        keep(
            of_class, calibrated={**{each: before[each] for each in before if each in PIPELINES}, name: said}
        )


def _is_left_out(name: str) -> bool:
    if name not in PIPELINES or is_possible(name):
        return False
    package = PIPELINES[name].package
    print(f"{name}: left out, it needs {package} (pip install {package})", file=sys.stderr)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="classes and tiny pipelines; all where none is named")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    given = parser.parse_args()
    names = [name for name in given.names or [*classes(), *PIPELINES] if not _is_left_out(name)]
    run = None if given.names else "pipelines"
    failed = each_in_a_process(names, _work, _keep, jobs=given.jobs, run=run)
    return int(bool(failed) or any(not each.is_fine for each in known().values()))


if __name__ == "__main__":
    sys.exit(main())
