"""Of `svdq doctor` and `svdq bench`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.bench.report import FUSED, NO_BRANCH, UNFUSED
from svdq_cli.cli.pages.shared import facts_table
from svdq_cli.text import bytes_text

if TYPE_CHECKING:
    from svdq_cli.bench.report import BenchReport, BenchRow, StepRow
    from svdq_cli.entrypoints.doctor import DoctorReport, SelfTest


def doctor(console: Console, report: DoctorReport, verbose: bool) -> None:
    facts = facts_table()
    facts.add_row("svdq", report.svdq_version)
    facts.add_row("python", report.python)
    for name, version in report.packages.items():
        facts.add_row(name, version or "not installed")
    absent = [name for name, version in report.optional.items() if version is None]
    present = [f"{name} {version}" for name, version in report.optional.items() if version]
    facts.add_row("optional", ", ".join([*present, *(f"no {name}" for name in absent)]))
    sm = f", sm_{report.device['sm']}" if report.device["sm"] else ""
    facts.add_row("device", f"{report.device['name']}{sm}, {report.machine.cores} cores")
    machine = report.machine
    facts.add_row("RAM", _free_of(machine.ram_free_bytes, machine.ram_bytes))
    if machine.vram_bytes is not None and machine.vram_free_bytes is not None:
        facts.add_row("GPU memory", _free_of(machine.vram_free_bytes, machine.vram_bytes))
    disks = [f"{bytes_text(free)} free in {folder}" for folder, free in machine.disk_free_bytes.items()]
    facts.add_row("disk", "; ".join(disks))
    facts.add_row("hub", "a token is stored" if report.hub_login else "not logged in (`hf auth login`)")
    console.print(facts)
    # Kernels for a GPU that is not here say nothing of this machine
    shown = [test for test in report.tests if verbose or test.status != "unavailable"]
    _self_tests(console, shown)
    if hidden := len(report.tests) - len(shown):
        console.print(f"{hidden} more can't run on this machine; -v shows them")
    console.print()
    console.print(Text(f"{report.summary[0].upper()}{report.summary[1:]}."))


def _free_of(free: int, total: int) -> str:
    return f"{bytes_text(free)} free of {bytes_text(total)}"


def _self_tests(console: Console, tests: Sequence[SelfTest]) -> None:
    """Each test's detail is below it: next to it, 80 columns would have no room for the operations' names."""
    titles = ("op", "precision", "mode", "backend", "status")
    rows = [(test.op, test.precision, test.mode, test.backend, test.status) for test in tests]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    details = ["", *(f"  {test.detail}" for test in tests)]
    for row, detail in zip([titles, *rows], details, strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print("  ".join(cells).rstrip())
        if detail:
            console.print(detail)


def bench(console: Console, report: BenchReport) -> None:
    facts = facts_table()
    device = report.device
    facts.add_row("device", device.name + (f", sm_{device.sm}" if device.sm else ""))
    for name in ("driver", "cuda", "torch", "threads", "backend"):
        if getattr(device, name) is not None:
            facts.add_row(name, str(getattr(device, name)))
    facts.add_row("baseline", report.rows[0].baseline)
    console.print(facts)
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    layers = [row for row in report.rows if row.op != "transformer-step"]
    for title in ("op", "precision", "M", "K", "N", "R", "us", "spread", "TFLOP/s", "ratio", "error"):
        table.add_column(title, justify="left" if title in ("op", "precision") else "right", no_wrap=True)
    shape = None
    for row in layers:
        if shape not in (None, (row.m, row.k, row.n)):
            table.add_row()
        shape = (row.m, row.k, row.n)
        table.add_row(
            _named(row),
            row.precision,
            *(str(size) for size in shape),
            "" if row.rank is None else str(row.rank),
            f"{row.us.median:.{1 if row.us.median < 1000 else 0}f}",
            f"{(row.us.p90 - row.us.p10) / row.us.median:.0%}",
            f"{row.tflops:.2g}" if row.tflops < 10 else f"{row.tflops:.0f}",
            f"{row.ratio:.2f}",
            "" if row.relative_error is None else f"{row.relative_error:.1e}",
        )
    console.print(table)
    console.print()
    exact = {f"{row.op} {row.precision}, R {row.rank}": row.exactness for row in layers}
    for label, exactness in exact.items():
        console.print(f"{label.removesuffix(', R None')}: {exactness}")
    console.print()
    _branches(console, layers)
    if report.steps:
        _steps(console, report.steps)
    for note in report.notes:
        console.print(note)


def _branches(console: Console, layers: Sequence[BenchRow]) -> None:
    """What a branch adds to each layer that was measured with and without one."""
    costs: dict[tuple[str, str], dict[str, float]] = {}
    for row in layers:
        if row.branch_cost is not None:
            shape = f"M {row.m}, K {row.k}, N {row.n}"
            costs.setdefault((shape, row.precision), {})[row.mode] = row.branch_cost
    for (shape, precision), found in costs.items():
        console.print(
            f"{shape}, {precision}: the branch adds {found[FUSED]:.1%} fused, {found[UNFUSED]:.1%} unfused"
        )
    if costs:
        console.print()


def _named(row: BenchRow) -> str:
    """Operation and way, where that is not the one of the whole table."""
    if row.mode in (FUSED, NO_BRANCH, UNFUSED):
        short = {NO_BRANCH: "no branch", UNFUSED: "unfused"}.get(row.mode, row.mode)
        named = short if row.op == "linear" else "quantize"
        return named if row.baseline == "torch-bf16" else f"{named}/fp32"
    return row.op.removesuffix(" linear") + (" unfused" if "+" in row.mode else "")


def _steps(console: Console, steps: Sequence[StepRow]) -> None:
    console.print(f"one step of {steps[0].model}, random weights:")
    table = Table(box=None, pad_edge=False)
    for title in ("precision", "mode", "ms", "ratio", "peak GiB", "of bfloat16"):
        table.add_column(title, justify="left" if title in ("precision", "mode") else "right")
    for row in steps:
        table.add_row(
            row.precision,
            row.mode,
            f"{row.us.median / 1000:.2f}",
            f"{row.ratio:.2f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
            "" if row.memory_ratio is None else f"1/{row.memory_ratio:.2f}",
        )
    console.print(table)
    console.print()
