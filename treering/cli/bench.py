"""Methods against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treering.cli.common import AsJson, app, output

bench = typer.Typer(help="Measure methods against each other.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


@bench.command()
def speed(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings for all.")] = None,
    *,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Training rows: files, or a folder a task.")],
    peers: Annotated[str | None, typer.Option(help="Names separated by commas; all by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Batches of a turn.")] = 4,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each; figures are their medians.")] = 5,
    eval_rows: Annotated[int, typer.Option(min=1, help="Held-out rows that are scored.")] = 96,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a hub name.")] = None,
    logs: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep what the trainers print here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Training and scoring beside what people use for them, on the same rows, in turns."""
    from treering.bench.speed import PEERS, SCORERS, Race, run_speed, table

    all_peers = (*PEERS, *SCORERS)
    names = all_peers if peers is None else [name.strip() for name in peers.split(",") if name.strip()]
    found = run_speed(Race(data, steps, turns, eval_rows, model, tuple(settings or ())), names, logs)
    output(found, as_json, table(found))


@bench.command()
def quality(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings for all methods.")
    ] = None,
    *,
    data: Annotated[Path, typer.Option(metavar="DIR", help="One folder a task, with train and test files.")],
    methods: Annotated[str, typer.Option(help="Names separated by commas.")] = "naive,replay,treering,joint",
    per_label: Annotated[int | None, typer.Option(min=1, help="Training rows a label.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Training rows a task.")] = None,
    eval_rows: Annotated[int | None, typer.Option(min=1, help="Test rows a task.")] = None,
    memory: Annotated[str, typer.Option(metavar="N|N%", help="Memory size.")] = "auto",
    epochs: Annotated[float, typer.Option(help="Passes over each task's rows.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of rows, order and training.")] = 42,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a hub name.")] = None,
    work: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep workspaces and finished results here.")] = None,
    as_json: AsJson = False,
) -> None:
    """A stream of tasks through several methods, at the same rate and epochs."""
    from treering.bench.quality import Stream, run_quality, table

    if per_label and rows:
        raise typer.BadParameter("give --per-label or --rows, not both")
    stream = Stream(data, per_label, rows, eval_rows, memory, epochs, seed, model, tuple(settings or ()))
    found = run_quality(stream, [name.strip() for name in methods.split(",") if name.strip()], work)
    output(found, as_json, table(found))
