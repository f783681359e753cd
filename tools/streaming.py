"""A data-free conversion against the least it has to do: reading the file, and one randomized SVD for each linear.

    python -m tools.streaming [--folder DIR] [--heads 24] [--blocks 1+1 1+4 1+7]

FLUX-shaped models of growing numbers of double and single blocks are generated, converted by `svdq convert`, and read
and decomposed by a process that does nothing else, with the same SVD. Both are timed from their start to their end.
Prints a Markdown table, the peak of memory, and what follows for FLUX.1-dev. Takes some minutes and 5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.generate_flux import generate_flux

FLUX_DEV = 11.9e9  # parameters
RANK = 32
# What the other process runs. Linears are the matrices with at least 1,000 rows and columns: embedders are smaller.
LEAST = f"""
import sys
from safetensors import safe_open
from svdq_cli.solve.low_rank import split_low_rank

with safe_open(sys.argv[1], "pt") as file:
    for name in file.keys():
        weight = file.get_tensor(name)
        if weight.ndim == 2 and min(weight.shape) >= 1000:
            split_low_rank(weight.float(), rank={RANK}, seed=0)
"""


@dataclass(frozen=True, slots=True)
class Took:
    """A process from its start to its end. Where other programs take the machine, the processor's time says more."""

    seconds: float
    processor_seconds: float  # of all cores


@dataclass(frozen=True, slots=True)
class Row:
    blocks: str
    parameters: int
    least: Took
    took: Took
    report: dict[str, Any]  # of the conversion

    @property
    def ram(self) -> float:
        return self.report["peak"]["ram_bytes"]


def measure(blocks: str, heads: int, folder: Path) -> Row:
    double, single = (int(count) for count in blocks.split("+"))
    model, out = folder / "model", folder / "out"
    parameters = generate_flux(model, double=double, single=single, heads=heads)
    options = ("--effort", "datafree", "--rank", str(RANK), "--device", "cpu", "--json", "-q", "--overwrite")
    least, _ = _timed("-c", LEAST, str(model / "diffusion_pytorch_model.safetensors"))
    took, said = _timed("-m", "svdq_cli", "convert", str(model), "-o", str(out), *options)
    return Row(blocks, parameters, least, took, json.loads(said))


def _timed(*arguments: str) -> tuple[Took, bytes]:
    before = os.times()
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, check=True)
    after = os.times()
    user = after.children_user - before.children_user
    system = after.children_system - before.children_system
    return Took(after.elapsed - before.elapsed, user + system), done.stdout


def table(rows: list[Row]) -> str:
    lines = [
        "| blocks | parameters | conversion, s | solve | pack | check | other | read, SVD, s | ratio | RAM, GB "
        "| processor, s | of read, SVD |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        stages = [row.report["seconds"][stage] for stage in ("solve", "pack", "check")]
        cells = (
            row.blocks,
            f"{row.parameters / 1e9:.2f} B",
            *(f"{value:.1f}" for value in (row.took.seconds, *stages, row.took.seconds - sum(stages))),
            f"{row.least.seconds:.1f}",
            f"{row.took.seconds / row.least.seconds:.2f}",
            f"{row.ram / 1e9:.2f}",
            f"{row.took.processor_seconds:.1f}",
            f"{row.least.processor_seconds:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def extrapolated(rows: list[Row]) -> str:
    """A straight line through the smallest and the largest model, at the size of FLUX.1-dev."""
    first, last = rows[0], rows[-1]
    more = FLUX_DEV - last.parameters
    grown = last.parameters - first.parameters
    seconds = last.took.seconds + more * (last.took.seconds - first.took.seconds) / grown
    least = last.least.seconds + more * (last.least.seconds - first.least.seconds) / grown
    return (
        f"FLUX.1-dev ({FLUX_DEV / 1e9:.1f} B), extrapolated: {seconds / 60:.1f} minutes, {seconds / least:.2f} times "
        f"reading and SVD; peak RAM from {first.blocks} to {last.blocks} blocks: {last.ram / first.ram - 1:+.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A data-free conversion against reading and one SVD a linear."
    )
    parser.add_argument("--folder", type=Path, help="where models lie meanwhile (else: a temporary folder)")
    parser.add_argument("--heads", type=int, default=24, help="attention heads of width 128")
    parser.add_argument("--blocks", nargs="+", default=["1+1", "1+4", "1+7"], metavar="DOUBLE+SINGLE")
    chosen = parser.parse_args()
    rows: list[Row] = []
    for blocks in chosen.blocks:
        with tempfile.TemporaryDirectory(prefix="svdq-streaming-", dir=chosen.folder) as folder:
            rows.append(measure(blocks, chosen.heads, Path(folder)))
    print(f"measured {time.strftime('%Y-%m-%d')}\n\n{table(rows)}")
    if rows[0].parameters < rows[-1].parameters:
        print(f"\n{extrapolated(rows)}")


if __name__ == "__main__":
    main()
