"""`--summary FILE`: the result of a command as Markdown, appended, as GitHub shows it on a run's page."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from svdq_cli.errors import UsageError
from svdq_cli.metrics import METRICS
from svdq_cli.reports import BASELINE_TITLES, VIDEO_FIGURES, to_json
from svdq_cli.text import cell, number, table

WORST_LAYERS = 5
MAX_PROBLEMS = 20
# Keys of reports -> what they are called, in this order
_FIGURES = {key: metric.heading for key, metric in METRICS.items()} | {"layer_sqnr_db": "layer SQNR (dB)"}


def append_summary(report: object, path: Path | None) -> None:
    """Append a report to `path` (None: nowhere), which `require_appendable` has seen. The command's result counts more
    than its summary: where the disk refuses it now, stderr says so."""
    if path is None:
        return
    text = "\n".join(_lines(to_json(report))) + "\n\n"
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        print(f"warning: {path}: can't write the summary there: {error.strerror}", file=sys.stderr)


def require_appendable(path: Path | None) -> Path | None:
    """Before the work: UsageError where no summary can be written."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise UsageError(
            f"{path}: can't write the summary there: {error.strerror}",
            hint="give --summary a file in a folder you may write to",
            where=str(path),
        ) from error
    return path


def _lines(report: Mapping[str, object]) -> Iterator[str]:
    yield f"### svdq {report['command']}: {report.get('status', 'ok')}"
    yield ""
    if report.get("error"):
        yield from _failure(_section(report, "error"))
    elif "runs" in report:
        yield from _several(cast("Sequence[Mapping[str, object]]", report["runs"]))
    elif "rows" in report:
        yield from _bench(report)
    else:
        yield from _facts(report)
    yield from _list("gates missed", report.get("gates_missed"))
    yield from _list("warnings", report.get("warnings"))


def _failure(error: Mapping[str, object]) -> Iterator[str]:
    yield f"**{cell(error['kind'])}** (exit code {error['code']}): {cell(error['message'])}"
    if error["hint"]:
        yield ""
        yield cell(error["hint"])


def _several(runs: Sequence[Mapping[str, object]]) -> Iterator[str]:
    rows: list[tuple[object, ...]] = []
    for run in runs:
        report = _section(run, "report")
        size, sqnr = report.get("bytes"), report.get("layer_sqnr_db")
        rows.append(
            (
                run["source"],
                run["code"],
                report["status"],
                f"{number(size['ratio'])}x smaller" if isinstance(size, Mapping) else "",
                number(sqnr["mean"]) if isinstance(sqnr, Mapping) else "",
                _section(report, "error").get("message", ""),
            )
        )
    yield from table(("recipe", "exit code", "status", "size", "layer SQNR (dB)", "error"), rows)


def _bench(report: Mapping[str, object]) -> Iterator[str]:
    device = _section(report, "device")
    yield f"{cell(device['name'])}, {cell(device['backend'])} backend"
    yield ""
    keys = ("op", "precision", "mode", "m", "k", "n", "rank")
    rows = [
        (
            *(row[key] for key in keys),
            number(_section(row, "us")["median"]),
            number(row["ratio"]),
            row["baseline"],
        )
        for row in cast("Sequence[Mapping[str, object]]", report["rows"])
    ]
    titles = ("op", "precision", "mode", "M", "K", "N", "R", "µs", "times the baseline's speed", "baseline")
    yield from table(titles, rows)


def _facts(report: Mapping[str, object]) -> Iterator[str]:
    yield from table(("", ""), list(_fact_rows(report)))
    yield from _figures(report)
    problems = cast("Sequence[Mapping[str, object]]", report.get("problems") or ())
    if problems:
        yield ""
        rows = [(problem["layer"], problem["what"]) for problem in problems[:MAX_PROBLEMS]]
        yield from table((f"{len(problems)} problems in", "what"), rows)


def _fact_rows(report: Mapping[str, object]) -> Iterator[tuple[object, ...]]:
    model = _section(report, "model")
    if model:
        yield "model", f"{model['family']} ({model['class']})"
    for output in cast("Sequence[Mapping[str, object]]", report.get("outputs") or ()):
        yield (
            output["format"],
            f"{output['path']}, {output['bytes']} bytes, sha256 {str(output['sha256'])[:12]}",
        )
    rank = _section(report, "rank")
    if rank:
        yield "precision, rank, effort", f"{report['precision']}, {rank['requested']}, {report['effort']}"
    size = _section(report, "bytes")
    if size:
        yield "size", f"{size['input']} -> {size['output']} bytes ({number(size['ratio'])}x smaller)"
    layers = report.get("layers")
    if isinstance(layers, Mapping):
        yield "layers", ", ".join(f"{count} {role}" for role, count in layers.items())
    elif layers is not None:
        yield "layers", layers
    for key in ("format", "images", "noise_floor_psnr_db", "fingerprint"):
        if report.get(key) is not None:
            yield key.replace("_", " "), number(report[key])


def _figures(report: Mapping[str, object]) -> Iterator[str]:
    """Mean and worst of every figure, the baselines' next to them."""
    models = {"converted": report, **_section(report, "baselines")}
    names = [key for key in _FIGURES if isinstance(report.get(key), Mapping)]
    if not names:
        return
    yield ""
    rows: list[tuple[object, ...]] = []
    videos = [key for key in VIDEO_FIGURES if _section(_section(report, "video"), key)]
    for model, figures in models.items():
        cells: list[object] = [BASELINE_TITLES.get(model, model)]
        for key in names:
            figure = cast("Mapping[str, object]", figures).get(key)  # type: ignore[union-attr]
            cells.append(f"{number(figure['mean'])} (worst {number(figure['min'])})" if figure else "")  # type: ignore[index]
        for key in videos:
            figure = _section(_section(cast("Mapping[str, object]", figures), "video"), key)
            cells.append(f"{number(figure['mean'])} (worst {number(figure['min'])})" if figure else "")
        rows.append(tuple(cells))
    headings = (*(_FIGURES[key] for key in names), *(VIDEO_FIGURES[key][0] for key in videos))
    yield from table(("", *headings), rows)
    per_layer = cast("Mapping[str, float]", _section(report, "layer_sqnr_db").get("per_layer") or {})
    worst = sorted(per_layer.items(), key=lambda item: item[1])[:WORST_LAYERS]
    if worst:
        yield ""
        yield from table(("worst layers", "SQNR (dB)"), [(name, number(value)) for name, value in worst])


def _list(title: str, items: object) -> Iterator[str]:
    if items:
        yield ""
        yield f"**{title}**"
        yield ""
        for item in cast("Sequence[object]", items):
            yield f"- {cell(item)}"


def _section(report: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = report.get(key)
    return cast("Mapping[str, object]", found) if isinstance(found, Mapping) else {}
