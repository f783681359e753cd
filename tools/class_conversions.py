"""Convert every class of diffusers that can be built, and keep what came of it for docs/families/classes.md.

`make pipelines`, a nightly target: about half an hour on two cores. Without calibration: each class with two layers
where its config counts layers, and narrower where that works, with random weights. With calibration: every pipeline of
`tests/tiny_pipelines.py`, from its prompts to an image. Exit code 1 where one fails that does not fail by its sizes.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from svdq_cli.checkpoint.check import check
from svdq_cli.conversion.convert import convert
from svdq_cli.errors import InputError
from svdq_cli.prepare.options import RunOptions
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import Quantization, Recipe, default_recipe
from svdq_cli.source import open_source
from svdq_cli.source.classes import empty_instance, model_class
from tools.model_class_facts import CONFIGS

RESULTS = Path(__file__).with_name("class_conversions.json")
_MAX_PARAMETERS = 400_000_000  # of a model that is converted: about a minute
_LAYERS = re.compile(r"(num_\w*(layers|blocks)|\w*_layers|n_?layers|depth|mmdit_layers|num_stages)")
_NARROWER = ("num_attention_heads", "num_key_value_heads", "heads", "num_heads")


@dataclass(frozen=True, slots=True)
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
    """`names`: classes and tiny pipelines; all of them where there are none. The exit code."""
    from tests.tiny_pipelines import PIPELINES
    from tools.model_classes import classes

    failed = False
    for name in names or [*classes(), *PIPELINES]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                if name in PIPELINES:
                    of_class, status = calibrated(name, Path(folder))
                    _keep(of_class, calibrated=status)
                else:
                    status = data_free(name, Path(folder))
                    _keep(name, data_free=status)
            except Exception as error:  # whatever one class raises, the others have their turn
                traceback.print_exc()
                status, failed = f"{type(error).__name__}: {error}", True
                if name not in PIPELINES:
                    _keep(name, data_free=status)
        print(f"{name}: {status}", file=sys.stderr, flush=True)
    return int(failed)


def _keep(name: str, **found: str) -> None:
    results = known()
    results[name] = replace(results.get(name, Conversions()), **found)
    text = json.dumps({name: asdict(each) for name, each in sorted(results.items())}, indent=1)
    RESULTS.write_text(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
