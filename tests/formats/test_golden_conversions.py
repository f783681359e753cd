"""Every file that svdq writes, byte for byte: a small model of each family in every format and precision.

The models are configs without weights (`golden/conversions/models.json`), their solved layers are numbers that every
machine makes alike: integers over powers of two. So a digest changes only where names, order, packing, headers or
configs do. Such a change is a decision; `python -m tests.formats.test_golden_conversions` then writes the digests anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from svdq_cli.checkpoint.writer import Contents, target_of, write_target
from svdq_cli.families import find_family
from svdq_cli.families.layouts import LAYOUTS
from svdq_cli.formats import all_formats, format_named
from svdq_cli.records import (
    Int4,
    LayerPlan,
    LayerSolution,
    NvFp4,
    W4A4Plan,
    W4A4Solution,
    W4A16Plan,
    W4A16Solution,
)
from tests.full_size import full_size_plan

GOLDEN = Path(__file__).parents[1] / "golden/conversions"
MODELS: dict[str, dict[str, object]] = json.loads((GOLDEN / "models.json").read_text())
PRECISIONS = {precision.name: precision for precision in (Int4(), NvFp4())}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cases() -> Iterator[str]:
    """ "model/format/precision/dtype"; float16 of one family, as no rule of a layout asks for the dtype."""
    for model, config in MODELS.items():
        family = find_family(config)
        for fmt in all_formats():
            held = any((each.family, each.format) == (family and family.name, fmt.name) for each in LAYOUTS)
            if not (fmt.own_names or held):
                continue
            for precision in fmt.precisions:
                yield f"{model}/{fmt.name}/{precision.name}/bf16"
                if model == "flux":
                    yield f"{model}/{fmt.name}/{precision.name}/fp16"


def integers(seed: object, low: int, high: int, *shape: int) -> Tensor:
    """Uniform in low..high-1, int64, the same on every machine."""
    number = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:4], "little")
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(number))


def solved(plan: LayerPlan, dtype: torch.dtype) -> LayerSolution:
    """A solution without a meaning; layers of one width have one smoothing factor and one down projection."""
    name, rows, columns = plan.name, plan.linear.out_features, plan.linear.in_features
    bias = integers((name, "bias"), -128, 128, rows).to(dtype) / 128 if plan.linear.bias else None
    if isinstance(plan, W4A16Plan):
        scales = integers((name, "scales"), 128, 256, rows, columns // plan.group).to(dtype) / 4096
        codes = integers((name, "codes"), 0, 16, rows, columns).to(torch.uint8)
        return W4A16Solution(plan, codes, scales, -(scales * 8), bias)
    assert isinstance(plan, W4A4Plan)
    groups = columns // plan.precision.group
    if isinstance(plan.precision, NvFp4):
        codes = integers((name, "codes"), 0, 16, rows, columns).to(torch.int8)
        scales = integers((name, "scales"), 1, 127, rows, groups).to(torch.uint8).view(torch.float8_e4m3fn)
        outer = integers((name, "outer"), 128, 256, 1).to(dtype) / 32768
    else:
        codes = integers((name, "codes"), -8, 8, rows, columns).to(torch.int8)
        scales = integers((name, "scales"), 128, 256, rows, groups).to(dtype) / 4096
        outer = None
    return W4A4Solution(
        plan=plan,
        smooth=(2.0 ** integers(("smooth", columns), -2, 3, columns)).to(dtype),
        down=integers(("down", columns), -128, 128, plan.rank, columns).to(dtype) / 1024,
        up=integers((name, "up"), -128, 128, rows, plan.rank).to(dtype) / 1024,
        codes=codes,
        scales=scales,
        outer=outer,
        bias=bias,
    )


def digest(case: str, folder: Path) -> str:
    """sha256 over the names and bytes of everything that is written for a case."""
    model, format_name, precision, dtype_name = case.split("/")
    fmt, dtype, config = format_named(format_name), DTYPES[dtype_name], MODELS[model]
    plan, inventory = full_size_plan(folder, config, fmt, PRECISIONS[precision], rank=16)
    target = target_of(fmt, plan, inventory.state, dtype)

    def kept(name: str) -> Tensor:
        return integers(name, -128, 128, *inventory.state[name]).to(dtype) / 128

    contents = Contents(
        configs={component: config for component in plan.components},
        state=inventory.state,
        solutions={layer.name: solved(layer, dtype) for layer in plan.layers},
        kept=kept,
        provenance={"made": "for the golden digests"},
    )
    out = folder / "out"
    write_target(out / "model.safetensors" if fmt.single_file else out, target, contents, pipeline=None)
    total = hashlib.sha256()
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        total.update(file.relative_to(out).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


@pytest.mark.parametrize("case", list(cases()))
def test_a_conversion_has_the_bytes_that_it_always_had(case: str, tmp_path: Path):
    known: dict[str, str] = json.loads((GOLDEN / "digests.json").read_text())
    assert digest(case, tmp_path) == known[case]


def test_no_digest_is_left_of_a_case_that_is_gone():
    assert json.loads((GOLDEN / "digests.json").read_text()).keys() == set(cases())


def write_digests() -> None:
    found: dict[str, str] = {}
    for case in cases():
        with TemporaryDirectory() as folder:
            found[case] = digest(case, Path(folder))
    (GOLDEN / "digests.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write_digests()
