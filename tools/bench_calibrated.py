"""The second half of `make bench-peers`: calibrated conversion beside svdq's peers, on the same layers and rows.

    python -m tools.bench_calibrated --sources demo --peers svdq deepcompressor-toolkit --precisions int4

Every peer runs in an environment of its own in build/peers (pinned wheels from PyPI; torch is this project's) and gets
the W4A4 layers of the embedded model and its stress variant with the calibration rows of their inputs: one sample,
generated once. Judged on activations of other prompts by one function here, which computes each layer as the runtimes
do, from what a file would hold. A peer that can't be installed or run is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.calibration.collect import collect_stats
from svdq_cli.conversion.read_weights import finite_tensor
from svdq_cli.inference.load import load_16bit_pipeline
from svdq_cli.pipelines.joint import joint_model
from svdq_cli.prepare.locate import DEMO_SOURCES
from svdq_cli.prepare.options import DEFAULT_OPTIONS
from svdq_cli.prepare.prepare import Prepared, prepare
from svdq_cli.prepare.prompts import chosen_prompts
from svdq_cli.prepare.sampling import sampling_for
from svdq_cli.recipe import Calibration, default_recipe
from svdq_cli.records import ActivationStats, Event, Int4, NvFp4, Precision
from svdq_cli.solve.quantizers import fake_quantize_activation
from svdq_cli.system.machine import resolve_device
from tools.bench_peers import FOLDER, failure, python_of, rows_of, show, table
from tools.calibrated_methods import PEERS
from tools.peer_methods import Taken

# What each peer is installed with. deepcompressor-toolkit's own list asks for xformers, bitsandbytes and evaluation
# suites, which nothing here imports.
PINS: dict[str, tuple[str, ...]] = {
    "deepcompressor-toolkit": (
        "--no-deps",
        "deepcompressor-toolkit==0.1.0",
        "omniconfig==0.1.10",
        "docstring_parser==0.18.0",
        "scipy==1.17.1",
    ),
    "auto-round": ("auto-round==0.16.1",),
    "cache-dit": ("cache-dit==1.5.3",),
    "nvidia-modelopt": ("nvidia-modelopt==0.47.0",),
    "amd-quark": ("amd-quark==0.13",),
}
PRECISIONS: dict[str, Precision] = {"int4": Int4(), "nvfp4": NvFp4()}
MINUTES = 60  # for one peer, on all sources
CALIBRATION_PROMPTS, JUDGING_PROMPTS, JUDGING_ROWS, JUDGING_SEED = 32, 16, 2048, 1000


def sqnr_db(
    weight: Tensor, parts: Mapping[str, Tensor], name: str, rows: Tensor, precision: Precision
) -> float:
    """Signal to quantization noise of one layer's output, in dB: 10 log10(sum y^2 / sum (y - y')^2).

    `weight` (N, K), `rows` (M, K): the exact layer and its input, any float dtype. `parts` holds what a file does:
    NAME.weight (N, K) dequantized, NAME.smooth (K,), NAME.up (N, R), NAME.down (R, K). Inputs are divided in 16 bits
    and rounded to 4 by the runtimes' rule; products in float32, no rounding of results. Raises ValueError for an output
    that is not finite.
    """
    four_bit, smooth, up, down = (parts[f"{name}.{part}"] for part in ("weight", "smooth", "up", "down"))
    x = rows.bfloat16()
    exact = x.float() @ weight.float().T
    y = fake_quantize_activation(x / smooth.bfloat16(), precision) @ four_bit.float().T
    y = y + (x.float() @ down.float().T) @ up.float().T
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"{name}: its output is not finite")
    noise = (exact - y).double().square().sum()
    return float(10 * torch.log10(exact.double().square().sum() / noise))


def write_problems(source: str, folder: Path, judging: Path) -> str:
    """The W4A4 layers of a model and calibration rows of their inputs into `folder`, as `tools.calibrated_methods`
    reads them, and rows of other prompts into `judging`, which no peer sees. Returns the name of both files."""
    recipe = default_recipe(source, calibration=Calibration(samples=CALIBRATION_PROMPTS))
    others = Calibration(prompts="calib_prompts/demo_eval.txt", samples=JUDGING_PROMPTS, seed=JUDGING_SEED)
    prepared = prepare(recipe)
    seen = _activations(prepared, sampling_for(recipe, prepared.source).rows)
    unseen = _activations(prepare(recipe.model_copy(update={"calibration": others})), JUDGING_ROWS)
    names = {plan.name for plan in prepared.plan.w4a4}
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, object]] = []
    for shared in prepared.plan.inputs:
        layers = [name for name in shared.layers if name in names]
        if not layers:
            continue
        branches = [each for each in shared.branches if names.issuperset(each)]
        described.append({"name": shared.name, "layers": layers, "branches": branches})
        tensors[f"{shared.name}.rows"] = seen[shared.name].rows
        for name in layers:
            tensors[f"{name}.weight"] = finite_tensor(prepared.source, f"{name}.weight").flatten(1).float()
    stem = source.replace(":", "-")
    save_file(tensors, folder / f"{stem}.safetensors")
    (folder / f"{stem}.json").write_text(json.dumps(described))
    save_file(
        {str(each["name"]): unseen[str(each["name"])].rows for each in described},
        judging / f"{stem}.safetensors",
    )
    return stem


def _activations(prepared: Prepared, rows: int) -> Mapping[str, ActivationStats]:
    """Rows of every layer input, of the prompts that the recipe names."""
    device = resolve_device(DEFAULT_OPTIONS.device)
    pipe = load_16bit_pipeline(prepared.source, class_name=prepared.plan.model_class, device=device)
    return collect_stats(
        pipe,
        joint_model(pipe, prepared.source.components),
        prepared.plan.inputs,
        chosen_prompts(prepared.recipe, DEFAULT_OPTIONS, _quiet).texts,
        sampling=sampling_for(prepared.recipe, prepared.source).settings,
        rows=rows,
    )


def _quiet(event: Event) -> None:
    """Progress is not shown."""


def taken_by(peer: str, inputs: Path, output: Path, precisions: Sequence[str]) -> list[Taken]:
    """What each method of a peer took; where its environment or its process fails, an entry a precision says why."""
    python, pins = Path(sys.executable), PINS.get(peer, ())
    why = None
    if pins:
        python = python_of(FOLDER / peer)
        why = failure([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins])
        why = why and f"not installed: {why}"
    if why is None:
        why = failure([python, "-m", "tools.calibrated_methods", peer, inputs, output, *precisions], MINUTES)
        why = why and f"not run: {why}"
    if why is not None:
        pinned = next((pin.partition("==")[2] for pin in pins if pin.startswith(f"{peer}==")), "")
        return [Taken(peer, pinned, "", precision, "", why=why) for precision in precisions]
    return [Taken(**entry) for entry in json.loads((output / f"{peer}.json").read_text())]


def mean_sqnr_db(entry: Taken, inputs: Path, output: Path, judging: Path) -> float:
    """The mean over layers of `sqnr_db` of what a method wrote."""
    assert entry.tensors is not None
    parts, weights = load_file(output / entry.tensors), load_file(inputs / f"{entry.source}.safetensors")
    unseen = load_file(judging / f"{entry.source}.safetensors")
    described = json.loads((inputs / f"{entry.source}.json").read_text())
    return fmean(
        sqnr_db(weights[f"{name}.weight"], parts, name, unseen[each["name"]], PRECISIONS[entry.precision])
        for each in described
        for name in each["layers"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_calibrated", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sources", nargs="+", default=DEMO_SOURCES, choices=DEMO_SOURCES)
    parser.add_argument("--peers", nargs="+", default=tuple(PEERS), choices=tuple(PEERS))
    parser.add_argument("--precisions", nargs="+", default=tuple(PRECISIONS), choices=tuple(PRECISIONS))
    parser.add_argument("--json", type=Path, default=FOLDER / "calibrated.json")
    wanted = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        inputs, output, judging = (Path(folder, name) for name in ("problems", "solved", "unseen"))
        for each in (inputs, output, judging):
            each.mkdir()
        sources = [write_problems(source, inputs, judging) for source in wanted.sources]
        taken = [each for peer in wanted.peers for each in taken_by(peer, inputs, output, wanted.precisions)]
        rows = rows_of(taken, lambda entry: mean_sqnr_db(entry, inputs, output, judging))
    head = f"calibrated on {CALIBRATION_PROMPTS} prompts, judged on {JUDGING_PROMPTS} others"
    show(head, table(rows, sources, "dB", (2, 0)), rows, wanted.json)


if __name__ == "__main__":
    main()
