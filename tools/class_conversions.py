"""Convert every class of diffusers that can be built, and keep what came of it for docs/families/classes.md.

`make pipelines`, a nightly target: about an hour on two cores. Without calibration: each class with one layer where
its config counts layers, and narrower where that works, with random weights. With calibration: every tiny pipeline of
`tests/tiny_pipelines.py`, from its prompts to an image. Exit code 1 where one fails that does not fail by its sizes.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError, SvdqError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import Quantization, Recipe, default_recipe
from svdq_cli.source import open_source
from svdq_cli.source.classes import empty_instance, model_class
from tools.model_class_facts import CONFIGS

RESULTS = Path(__file__).with_name("class_conversions.json")
_MAX_PARAMETERS = 600_000_000  # of a model that is converted: about a minute
_LAYERS = re.compile(r"(num_\w*(layers|blocks)|\w*_layers|n_?layers|depth|mmdit_layers|num_stages)")
_NARROWER = ("num_attention_heads", "num_key_value_heads", "heads", "num_heads")


@dataclass(slots=True)
class Conversions:
    """What became of a class: "ok", or why not. Empty where it was not tried."""

    data_free: str = ""
    calibrated: str = ""


def known() -> dict[str, Conversions]:
    """The results of the last `make pipelines`, by class."""
    if not RESULTS.is_file():
        return {}
    return {name: Conversions(**found) for name, found in json.loads(RESULTS.read_text()).items()}


def data_free(name: str, folder: Path) -> str:
    """A small model of the class, converted without calibration and checked."""
    reason = "no smaller config of it can be built"
    for config in _smaller(name):
        path = folder / "config.json"
        path.write_text(json.dumps({"_class_name": name, **config}))
        try:
            model = empty_instance(name, json.dumps(config), str(path))
            prepare(_recipe(path))
        except InputError as error:
            reason = error.message.removeprefix(f"{path}: ")
            continue
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if parameters > _MAX_PARAMETERS:
            reason = f"too large to be tried: {parameters / 1e9:.1f} B parameters"
            continue
        return _converted(name, config, folder)
    return reason


def _converted(name: str, config: Mapping[str, Any], folder: Path) -> str:
    torch.manual_seed(0)
    model = model_class(name, where=name).from_config(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if not bool(parameter.isfinite().all()) or not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    source, out = folder / "source", folder / "out"
    model.save_pretrained(source)
    del model
    report = convert(_recipe(source), out, options=RunOptions(device="cpu"))
    found = check(out, against=open_source(source)).status
    return "ok" if (report.status, found) == ("ok", "ok") else f"convert: {report.status}, check: {found}"


def _recipe(source: Path) -> Recipe:
    wanted = {"effort": "datafree", "rank": 16, "refinements": 0}
    return default_recipe(str(source), quantization=Quantization.model_validate(wanted))


def _smaller(name: str) -> Iterator[dict[str, Any]]:
    """Configs of a class, the smallest first: fewer layers and heads, fewer layers, its own."""
    own = _own_config(name)
    shallow = {key: _few(value) if _LAYERS.fullmatch(key) else value for key, value in own.items()}
    yield {**shallow, **{key: 2 for key in _NARROWER if isinstance(own.get(key), int)}}
    yield shallow
    yield own


def _few(value: Any) -> Any:
    return min(value, 2) if isinstance(value, int) and not isinstance(value, bool) else value


def _own_config(name: str) -> dict[str, Any]:
    given = dict(CONFIGS.get(name, {}))
    model = empty_instance(name, json.dumps(given), name)
    config = {key: value for key, value in dict(getattr(model, "config", {})).items() if key[0] != "_"}
    return {**json.loads(json.dumps(config)), **given}


def calibrated(pipeline: str, folder: Path) -> tuple[str, str]:
    """The class of a tiny pipeline's denoiser, and what became of it."""
    from tests.tiny_pipelines import round_trip

    report = round_trip(pipeline, folder)
    return report.model.model_class, report.status


def main(names: list[str]) -> int:
    from tests.tiny_pipelines import PIPELINES
    from tools.model_classes import classes

    results, failed = known(), False
    for name in classes() if not names else [name for name in names if name not in PIPELINES]:
        results.setdefault(name, Conversions())
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[name].data_free = data_free(name, Path(folder))
            except (SvdqError, Exception) as error:
                traceback.print_exc()
                results[name].data_free, failed = f"{type(error).__name__}: {error}", True
        print(name, "data-free:", results[name].data_free, file=sys.stderr, flush=True)
    for pipeline in PIPELINES if not names else [name for name in names if name in PIPELINES]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                name, status = calibrated(pipeline, Path(folder))
            except (SvdqError, Exception) as error:
                traceback.print_exc()
                print(pipeline, "failed:", error, file=sys.stderr, flush=True)
                failed = True
                continue
        results.setdefault(name, Conversions()).calibrated = status
        print(pipeline, name, status, file=sys.stderr, flush=True)
    RESULTS.write_text(
        json.dumps({name: asdict(found) for name, found in sorted(results.items())}, indent=1) + "\n"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
