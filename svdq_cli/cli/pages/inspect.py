"""What `svdq inspect` shows of a model or a checkpoint."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svdq_cli.cli.pages.shared import count_text, encoder_rows, facts_table, size_text
from svdq_cli.planning.blocks import Place, in_blocks, places_of
from svdq_cli.reports import InspectLayer, InspectReport

if TYPE_CHECKING:
    from svdq_cli.entrypoints.init import RecipesReport


def inspection(console: Console, report: InspectReport, verbose: bool) -> None:
    facts = facts_table()
    facts.add_row("kind", f"{report.kind} ({report.read_as})" if report.read_as else report.kind)
    facts.add_row("model", f"{report.family} ({report.model_class}), {count_text(report.parameters)}")
    branch = "no low-rank branch" if report.rank is None else f"rank {report.rank}"
    facts.add_row("format", f"{report.format}, {report.precision}, {branch}")
    planned = " planned" if report.kind == "source" else ""
    facts.add_row(f"size{planned}", size_text(report.bytes.input, report.bytes.output, report.bytes.ratio))
    for row in encoder_rows(report.text_encoders):
        facts.add_row(*row)
    if report.loras:
        facts.add_row("LoRAs", ", ".join(report.loras))
    if report.provenance:
        for key in ("svdq_version", "source_sha256", "calibration_sha256", "fingerprint"):
            if (value := report.provenance.get(key)) is not None:
                facts.add_row(key, str(value))
    console.print(facts)
    console.print(_every_layer(report) if verbose else _by_stack(report))
    for warning in report.warnings:
        console.print(f"warning: {warning}")


def recipes(console: Console, report: RecipesReport, verbose: bool) -> None:
    """A line each; with `verbose` where the model comes from and where the checkpoint goes."""
    table = Table(box=None, pad_edge=False, show_header=verbose)
    for title in ("recipe", "what", *(("model", "output") if verbose else ())):
        table.add_column(title, overflow="fold", no_wrap=title == "recipe")
    for recipe in report.recipes:
        more = (recipe.source, recipe.output or "") if verbose else ()
        table.add_row(recipe.name, Text(recipe.about), *more)
    console.print(table)
    console.print("next: svdq convert NAME, or svdq init NAME -o mine.yaml to change one first")


def _every_layer(report: InspectReport) -> Table:
    table = _table("role", "rank", "in", "out", "layer")
    for layer in report.layers:
        why = f": {layer.kept_because}" if layer.kept_because else ""
        table.add_row(*_figures(layer), Text(layer.name).append(why, style="dim"))
    return table


def _by_stack(report: InspectReport) -> Table:
    """A heading for each stack of blocks, and below it a row for each kind and size of layer.

    "2 x attn.to_q+to_k+to_v, attn.to_out.0": each of those layers occurs twice in the stack, and "+" joins layers that
    read one input.
    """
    named = {layer.name: layer for layer in report.layers}
    places = places_of(
        list(dict.fromkeys([*named, *(layer.input for layer in report.layers if layer.input)]))
    )
    stacks: dict[str, list[InspectLayer]] = defaultdict(list)
    for name in in_blocks(named, places):
        stacks[places[name].stack].append(named[name])
    table = _table("role", "rank", "in", "out", "layers")
    for stack, layers in stacks.items():
        table.add_row("", "", "", "", Text(stack or "outside the blocks", style="bold"))
        kinds: dict[tuple[str, str, str, str], list[InspectLayer]] = defaultdict(list)
        for layer in layers:
            kinds[_figures(layer)].append(layer)
        for figures, members in kinds.items():
            table.add_row(*figures, Text(_counted(members, places)))
    return table


def _counted(layers: Iterable[InspectLayer], places: Mapping[str, Place]) -> str:
    """Layers by how often their role occurs in the stack: "19 x attn.to_q+to_k+to_v, ff.net.2"."""
    counts = Counter(places[layer.name].role for layer in layers)
    # W4A16 layers have codes of their own whatever they read: to know what they share says nothing.
    inputs = {
        places[layer.name].role: places[layer.input].role
        for layer in layers
        if layer.input and layer.role == "w4a4"
    }
    shared: dict[tuple[int, str], list[str]] = defaultdict(list)
    for role, count in counts.items():
        shared[count, inputs.get(role, role)].append(role)
    by_count: dict[int, list[str]] = defaultdict(list)
    for (count, _), roles in shared.items():
        by_count[count].append(_joined(roles))
    by_count = {count: _numbers_joined(texts) for count, texts in by_count.items()}
    return "; ".join(f"{count} x {', '.join(texts)}" for count, texts in by_count.items())


def _joined(roles: list[str]) -> str:
    """["attn.to_q", "attn.to_k"] -> "attn.to_q+to_k"."""
    first, *others = roles
    module = f"{first.rpartition('.')[0]}."
    return "+".join([first, *(other.removeprefix(module) for other in others)])


def _numbers_joined(roles: list[str]) -> list[str]:
    """["experts.proj.0", "experts.proj.1", "experts.proj.2"] -> ["experts.proj.0 to 2"]; pairs stay as they are."""
    runs: list[list[str]] = []
    for role in roles:
        stem, _, number = role.rpartition(".")
        before, _, last = runs[-1][-1].rpartition(".") if runs else ("", "", "")
        follows = stem == before and number.isdecimal() and last.isdecimal() and int(number) == int(last) + 1
        if follows:
            runs[-1].append(role)
        else:
            runs.append([role])
    return [
        text
        for run in runs
        for text in ([f"{run[0]} to {run[-1].rpartition('.')[2]}"] if len(run) > 2 else run)
    ]


def _figures(layer: InspectLayer) -> tuple[str, str, str, str]:
    return layer.role, str(layer.rank or ""), str(layer.in_features), str(layer.out_features)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title in ("rank", "in", "out") else "left")
    return table
