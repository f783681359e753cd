"""What `svdq convert --plan` says against what the conversion takes, for six configurations.

    python -m tools.plan_accuracy [--folder DIR] [--only NAME ...]

Every conversion runs in a process of its own, and nothing else should run meanwhile. Prints a Markdown table; takes
some minutes and 2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.generate_flux import generate_flux

PROMPTS = ("a red circle", "two blue squares", "a green triangle on the left", "three small stars")
SAMPLED = ("--samples", "4", "--steps", "6")


@dataclass(frozen=True, slots=True)
class Configuration:
    """A source (`demo`, or the heads of a FLUX-shaped model with one double and two single blocks) and options."""

    name: str
    source: str | int
    options: tuple[str, ...]
    generates: bool = False


CONFIGURATIONS = (
    Configuration("demo, data-free", "demo", ("--effort", "datafree")),
    Configuration("demo, fast", "demo", ("--effort", "fast"), generates=True),
    Configuration(
        "demo, balanced, nvfp4", "demo", ("--effort", "balanced", "--precision", "nvfp4"), generates=True
    ),
    Configuration("demo, best", "demo", ("--effort", "best"), generates=True),
    Configuration("FLUX, width 1024, data-free", 8, ("--effort", "datafree")),
    Configuration("FLUX, width 3072, data-free", 24, ("--effort", "datafree")),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Predicted and seen."""

    name: str
    seconds: tuple[float, float]
    ram: tuple[float, float]  # bytes
    disk: tuple[float, float]  # bytes
    output: tuple[float, float]  # bytes


def measure(configuration: Configuration, folder: Path) -> Row:
    source = _source(configuration, folder)
    out = folder / "out"
    command = ["convert", source, "-o", str(out), *configuration.options, "--device", "cpu", "--json", "-q"]
    if configuration.generates:
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        command += ["--prompts", str(prompts), *SAMPLED]
    _run([*command, "--plan"])  # the first one measures the machine
    plan = _run([*command, "--plan"])
    with _largest(folder / ".out.work", out, folder) as disk:
        report = _run(command)
    row = Row(
        configuration.name,
        (plan["seconds"], report["seconds"]["total"]),
        (plan["ram_bytes"], report["peak"]["ram_bytes"]),
        (plan["disk_bytes"], disk[0]),
        (plan["bytes"]["output"], report["bytes"]["output"]),
    )
    shutil.rmtree(out)
    return row


def _source(configuration: Configuration, folder: Path) -> str:
    if isinstance(configuration.source, str):
        return configuration.source
    model = folder / f"flux-{configuration.source}"
    if not model.exists():
        generate_flux(model, double=1, single=2, heads=configuration.source)
    return str(model)


def _run(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "svdq_cli", *arguments], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@contextmanager
def _largest(work: Path, out: Path, folder: Path) -> Iterator[list[int]]:
    """The most bytes that the work folder and the output (under its partial name) take together meanwhile."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            ours = (work, out, *folder.glob(f".{out.name}.partial-*"))
            most[0] = max(most[0], sum(_bytes(path) for path in ours))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        stop.set()
        watcher.join()


def _bytes(path: Path) -> int:
    try:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except FileNotFoundError:  # renamed meanwhile; the next look will tell
        return 0


def table(rows: list[Row]) -> str:
    """Predicted / seen (their ratio)."""

    def cell(pair: tuple[float, float], unit: float, digits: int) -> str:
        predicted, seen = pair
        return f"{predicted / unit:.{digits}f} / {seen / unit:.{digits}f} ({predicted / max(seen, 1e-9):.2f})"

    lines = [
        "| configuration | seconds | RAM, MB | disk, MB | output, MB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            cell(row.seconds, 1, 1),
            *(cell(pair, 1e6, 0) for pair in (row.ram, row.disk, row.output)),
        )
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The accuracy of --plan, as a Markdown table.")
    parser.add_argument(
        "--folder", type=Path, help="where models and outputs lie meanwhile (else: a temporary one)"
    )
    parser.add_argument("--only", nargs="+", choices=[each.name for each in CONFIGURATIONS], metavar="NAME")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="svdq-plan-", dir=chosen.folder) as folder:
        rows = [
            measure(configuration, Path(folder))
            for configuration in CONFIGURATIONS
            if chosen.only is None or configuration.name in chosen.only
        ]
    print(f"measured {time.strftime('%Y-%m-%d')}, predicted / seen (ratio)\n\n{table(rows)}")


if __name__ == "__main__":
    main()
