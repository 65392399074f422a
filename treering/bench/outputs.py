"""What a benchmark leaves: a table, the same as Markdown, a plot of old against new, matrices, JSON."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treering.bench.tuning import words
from treering.files import write_file, write_json
from treering.report import template

MEASURES = {
    "average_accuracy": "average",
    "new": "new",
    "old": "old",
    "bwt": "BWT",
    "fwt": "FWT",
    "forgetting": "forgetting",
    "negative_flips": "negative flips",
}


def write_all(found: Mapping[str, Any], folder: Path) -> None:
    """`results.json`, `table.md`, `pareto.html` and `matrices/` (a CSV a run) into `folder`."""
    matrices = folder / "matrices"
    matrices.mkdir(parents=True, exist_ok=True)
    for number, (name, method) in enumerate(found["methods"].items()):
        for run in method["runs"]:
            file = f"{number:02}-{_file_name(name)}-seed{run['seed']}-order{run['order']}.csv"
            write_file(matrices / file, _matrix(run).encode())
    write_json(folder / "results.json", found)
    write_file(folder / "table.md", ("\n".join(markdown(found)) + "\n").encode())
    write_file(folder / "pareto.html", pareto(found).encode())


def header(found: Mapping[str, Any]) -> list[str]:
    """The columns of the table."""
    general = ["perplexity", "questions"] if found["general"] else []
    against = ["against " + found["stream"]["baseline"]] if found["stream"]["baseline"] else []
    costs = ["seconds", "tuning s", "rows trained", "peak memory", "stored"]
    return ["method", *MEASURES.values(), *against, *general, *costs]


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The lines of the table, a method each; scores in points."""
    lines = []
    for name, method in found["methods"].items():
        cost, tuning = method["cost"], method["tuning"]
        line = [name, *(_score(method["measures"][measure]) for measure in MEASURES)]
        if found["stream"]["baseline"]:
            line.append(_against(method["against"]))
        if found["general"]:
            line += _general(method["general"])
        line += [
            f"{cost['seconds']:,.0f}",
            f"{tuning['seconds']:,.0f}" if tuning else "-",
            f"{cost['rows_trained']:,.0f}",
            f"{cost['peak_memory_mb']:,.0f} MB",
            _bytes(cost["stored_bytes"]),
        ]
        lines.append(line)
    return lines


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the table does not show: how it is meant, what was tuned, what the untouched model could do."""
    stream = found["stream"]
    runs = f"{len(stream['seeds'])} seed{'s' * (len(stream['seeds']) > 1)}, {stream['orders']} order"
    lines = [
        f"{runs}{'s' * (stream['orders'] > 1)}; ± is the standard deviation between seeds, in brackets the 95% "
        "interval over rows and runs"
    ]
    if stream["baseline"]:
        lines.append(
            f"against {stream['baseline']}: the average, paired by row, seed and order; no difference where it is "
            "within the spread between seeds or the interval holds zero"
        )
    for name, method in found["methods"].items():
        if method["tuning"]:
            lines.append(f"{name}: learning rate {words(method['tuning'])}")
    before = found["general"]
    if before:
        lines.append(f"before: perplexity {_number(before['perplexity'])}, questions {100 * before['questions']:.0f}")
        named = {"before": before, **{name: method["general"] for name, method in found["methods"].items()}}
        for name, general in named.items():
            for task, values in (general or {"tasks": {}})["tasks"].items():
                lines.append(f"{name}: {task} " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    return lines


def table(found: Mapping[str, Any]) -> list[str]:
    """The table for a terminal, as lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(header(found)):
        drawn.add_column(title, justify="right" if number else "left", overflow="fold")
    for line in cells(found):
        drawn.add_row(*map(_escaped, line))
    text = io.StringIO()
    terminal = Console()
    Console(file=text, width=max(100, terminal.width) if terminal.is_terminal else 240).print(drawn)
    return [*(line.rstrip() for line in text.getvalue().splitlines() if line.strip()), *notes(found)]


def markdown(found: Mapping[str, Any]) -> list[str]:
    """The same for a page."""
    titles = header(found)
    lines = [titles, ["---"] * len(titles), *cells(found)]
    return [
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines),
        "",
        *(f"- {note}" for note in notes(found)),
    ]


def pareto(found: Mapping[str, Any]) -> str:
    """A page with no network: old-task accuracy against new-task accuracy, the size of a point its rows trained."""
    from plotly.offline import get_plotlyjs

    points = [_point(name, method) for name, method in found["methods"].items()]
    points = [point for point in points if point["x"] is not None and point["y"] is not None]
    for point in points:
        point["front"] = not any(_beats(other, point) for other in points)
    return template("pareto.html.j2").render(
        points=points, header=header(found), lines=cells(found), notes=notes(found), plotly=get_plotlyjs()
    )


def _point(name: str, method: Mapping[str, Any]) -> dict[str, Any]:
    old, new, cost = method["measures"]["old"], method["measures"]["new"], method["cost"]
    costs = f"{cost['seconds']:,.0f} s, {cost['rows_trained']:,.0f} rows trained, {cost['peak_memory_mb']:,.0f} MB"
    return {
        "name": html.escape(name, quote=False),  # plotly reads tags in a name as markup.
        "x": old["mean"],
        "y": new["mean"],
        "x_interval": [old["low"], old["high"]],
        "y_interval": [new["low"], new["high"]],
        "rows": cost["rows_trained"],
        "costs": f"{costs}, {_bytes(cost['stored_bytes'])} stored",
    }


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether it is as good in both, and better in one."""
    return bool(one["x"] >= other["x"] and one["y"] >= other["y"] and (one["x"], one["y"]) != (other["x"], other["y"]))


def _matrix(run: Mapping[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["update", *run["tasks"]])
    for number, row in enumerate(run["matrix"], start=1):
        writer.writerow([number if run["learned"] is not None else 0, *("" if v is None else v for v in row)])
    return text.getvalue()


def _score(measure: Mapping[str, Any]) -> str:
    if measure["mean"] is None:
        return "-"
    text = f"{100 * measure['mean']:.1f}"
    if measure["spread"] is not None:
        text += f" ±{100 * measure['spread']:.1f}"
    if measure["low"] is not None:
        text += f" [{100 * measure['low']:.1f}, {100 * measure['high']:.1f}]"
    return text


def _against(found: Mapping[str, Any] | None) -> str:
    one = found and found["average_accuracy"]
    if not one:
        return "-"
    return f"{100 * one['mean']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}] {one['verdict']}"


def _general(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    return [_number(found["perplexity"]), f"{100 * found['questions']:.0f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _bytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MB"


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:60]


def _escaped(cell: str) -> str:
    from rich.markup import escape

    return escape(cell)
