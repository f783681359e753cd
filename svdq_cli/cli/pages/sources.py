"""Of `svdq inspect`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.cli.pages.pieces import count_text, facts_table, size_text
from svdq_cli.records import InspectReport


def inspection(console: Console, report: InspectReport, verbose: bool) -> None:
    facts = facts_table()
    facts.add_row("kind", f"{report.kind} ({report.read_as})" if report.read_as else report.kind)
    facts.add_row("model", f"{report.family} ({report.model_class}), {count_text(report.parameters)}")
    facts.add_row("format", f"{report.format}, {report.precision}, rank {report.rank}")
    planned = " planned" if report.kind == "source" else ""
    facts.add_row(f"size{planned}", size_text(report.bytes.input, report.bytes.output, report.bytes.ratio))
    if report.provenance:
        for key in ("svdq_version", "source_sha256", "calibration_sha256", "fingerprint"):
            facts.add_row(key, str(report.provenance.get(key)))
    console.print(facts)
    table = Table(box=None, pad_edge=False)
    for title in ("role", "rank", "in", "out", "layers" if not verbose else "layer"):
        table.add_column(title, justify="right" if title in ("rank", "in", "out") else "left")
    if verbose:
        for layer in report.layers:
            table.add_row(
                layer.role,
                str(layer.rank or ""),
                str(layer.in_features),
                str(layer.out_features),
                Text(layer.name),
            )
    else:
        groups: dict[tuple[str, int | None, int, int, str], int] = {}
        for layer in report.layers:
            pattern = _any_block(layer.name)
            key = (layer.role, layer.rank, layer.in_features, layer.out_features, pattern)
            groups[key] = groups.get(key, 0) + 1
        shared = {_any_block(layer.name): _any_block(layer.input) for layer in report.layers if layer.input}
        for (role, rank, width, height, pattern), count in groups.items():
            same = shared.get(pattern, pattern)
            reads = (
                ""
                if same == pattern or role == "w4a16"
                else f"  (reads what {same.rsplit('.', 1)[-1]} reads)"
            )
            table.add_row(role, str(rank or ""), str(width), str(height), Text(f"{count} x {pattern}{reads}"))
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}")


def _any_block(name: str) -> str:
    """transformer_blocks.7.attn.to_out.0 -> transformer_blocks.*.attn.to_out.0"""
    stack, *rest = name.split(".")
    return ".".join(
        [stack, *("*" if part.isdigit() and index == 0 else part for index, part in enumerate(rest))]
    )
