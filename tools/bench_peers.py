"""`make bench-peers`: data-free conversion beside svdq's peers, on the very same weights, in one run.

    python -m tools.bench_peers --sources demo --peers svdq auto-round --json build/peers/table.json

Makes an environment of its own in build/peers (the peers' pinned wheels from PyPI; torch is this project's, so that all
multiply alike) and gives every peer the W4A4 layers of the embedded model and its stress variant. One function here
computes every error, from the dequantized weight and the branch; a peer that can't be installed or run is a row that
says why. Processor seconds, one thread, of solving alone: neither reading nor writing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdq_cli.conversion.read_weights import finite_tensor
from svdq_cli.prepare.locate import DEMO_SOURCES
from svdq_cli.prepare.prepare import prepare
from svdq_cli.recipe import default_recipe, with_overrides
from tools.peer_methods import PEERS, RANK, Taken

PINS = {
    "auto-round": "0.16.1",
    "sdnq": "0.2.8",
    "cache-dit": "1.5.3",
    "nvidia-modelopt": "0.47.0",
}
FOLDER = Path("build/peers")
MINUTES = 10  # for one peer, on all sources


@dataclass(frozen=True)
class Row:
    """A method on all sources, which are the keys."""

    peer: str
    version: str
    method: str
    precision: str
    figures: Mapping[str, float]  # mean over layers of what is compared
    bytes: int | None
    seconds: Mapping[str, float]
    why: str | None


def relative_error(weight: Tensor, parts: Mapping[str, Tensor], name: str) -> float:
    """|W - W'| / |W|, Frobenius, of one layer's weight (N, K). `parts` holds W' as its dequantized weight, up (N, R)
    and down (R, K), in any float dtype."""
    four_bit, up, down = (parts[f"{name}.{part}"].double() for part in ("weight", "up", "down"))
    exact = weight.double()
    return float((exact - four_bit - up @ down).norm() / exact.norm())


def write_layers(source: str, folder: Path) -> Path:
    """The W4A4 layers of a model, as `tools.peer_methods` reads them. Returns the file of weights."""
    recipe = default_recipe(source, calibration=None)
    prepared = prepare(with_overrides(recipe, {"quantization.effort": "datafree"}))
    names = {plan.name for plan in prepared.plan.w4a4}
    file = folder / f"{source.replace(':', '-')}.safetensors"
    save_file(
        {name: finite_tensor(prepared.source, f"{name}.weight").flatten(1).float() for name in names}, file
    )
    branches = [branch for shared in prepared.plan.inputs for branch in shared.branches if names & {*branch}]
    file.with_suffix(".json").write_text(json.dumps(branches))
    return file


def python_of(folder: Path) -> Path:
    """An environment in `folder`, made once, that sees this one's packages after its own."""
    if not (folder / "pyvenv.cfg").exists():
        venv.create(folder, with_pip=False)
        paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
        Path(paths["purelib"], "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def taken_by(peer: str, python: Path, inputs: Path, output: Path) -> list[Taken]:
    """What each method of a peer took; where its environment or its process fails, one entry that says why."""
    failed = Taken(peer, PINS.get(peer, ""), "", "int4", "")
    if peer in PINS:
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if why := failure([*pip, f"{peer}=={PINS[peer]}"]):
            return [replace(failed, why=f"not installed: {why}")]
    else:
        python = Path(sys.executable)
    script = Path(__file__).with_name("peer_methods.py")
    if why := failure([python, script, peer, inputs, output]):
        return [replace(failed, why=f"not run: {why}")]
    return [Taken(**entry) for entry in json.loads((output / f"{peer}.json").read_text())]


def failure(command: Sequence[str | Path], minutes: float = MINUTES) -> str | None:
    """The last line of what a command that fails says, or that it took longer than `minutes`; or None."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return f"not done after {minutes:g} minutes"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else None


def mean_error(entry: Taken, inputs: Path, output: Path) -> float:
    """The mean over layers of the relative error of what a method wrote."""
    assert entry.tensors is not None
    parts, weights = load_file(output / entry.tensors), load_file(inputs / f"{entry.source}.safetensors")
    return fmean(relative_error(weight, parts, name) for name, weight in weights.items())


def rows_of(taken: Iterable[Taken], figure: Callable[[Taken], float]) -> list[Row]:
    """One row for each method; `figure` of what it wrote for a source."""
    rows: dict[tuple[str, str, str], Row] = {}
    for entry in taken:
        key = (entry.peer, entry.method, entry.precision)
        row = rows.get(key) or Row(*key[:1], entry.version, *key[1:], {}, None, {}, None)
        rows[key] = replace(row, why=row.why or entry.why)
        if entry.tensors is None or entry.seconds is None:
            continue
        rows[key] = replace(
            rows[key],
            figures={**row.figures, entry.source: figure(entry)},
            seconds={**row.seconds, entry.source: entry.seconds},
            bytes=entry.bytes,
        )
    return list(rows.values())


def table(rows: Sequence[Row], sources: Sequence[str], figure: str, decimals: tuple[int, int]) -> str:
    """Markdown: a table for each precision, in the order of `rows`. `figure`: what it is called; `decimals`: its own
    and those of seconds."""
    heads = [*(f"{source}: {figure}" for source in sources), "bytes", *(f"{source}: s" for source in sources)]
    lines: list[str] = []
    for precision in dict.fromkeys(row.precision for row in rows):
        lines += [f"\n| {precision} | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        for row in rows:
            if row.precision != precision:
                continue
            name = f"{row.peer} {row.version} {row.method}".strip()
            if row.why:
                lines.append(f"| {name} | {row.why.replace('|', '/')} |" + " |" * (len(heads) - 1))
                continue
            figures = [f"{row.figures[source]:.{decimals[0]}f}" for source in sources]
            seconds = [f"{row.seconds[source]:.{decimals[1]}f}" for source in sources]
            lines.append(f"| {name} | " + " | ".join([*figures, f"{row.bytes:,}", *seconds]) + " |")
    return "\n".join(lines).lstrip("\n")


def show(head: str, printed: str, rows: Sequence[Row], file: Path) -> None:
    """A table on the screen, below a line that says what it was measured with, and its rows as JSON."""
    made = f"torch {torch.__version__}, one thread, {platform.machine()}"
    print(f"{date.today()}, rank {RANK}, {head}, {made}\n\n{printed}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_peers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sources", nargs="+", default=DEMO_SOURCES, choices=DEMO_SOURCES)
    parser.add_argument("--peers", nargs="+", default=tuple(PEERS), choices=tuple(PEERS))
    parser.add_argument("--json", type=Path, default=FOLDER / "table.json")
    wanted = parser.parse_args()
    python = python_of(FOLDER / "venv")
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder, "weights"), Path(folder, "solved")
        for each in (inputs, output):
            each.mkdir()
        sources = [write_layers(source, inputs).stem for source in wanted.sources]
        taken = [each for peer in wanted.peers for each in taken_by(peer, python, inputs, output)]
        rows = rows_of(taken, lambda entry: mean_error(entry, inputs, output))
    show("data-free", table(rows, sources, "error", (4, 2)), rows, wanted.json)


if __name__ == "__main__":
    main()
