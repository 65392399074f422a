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
    methods: Annotated[
        str | None, typer.Option(help="NAME, NAME:key=value,... or FILE.yaml, separated by commas; all by default.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="Seeds of training rows and training.")] = "42",
    orders: Annotated[int, typer.Option(min=1, help="Orders of the tasks: as named, then shuffled ones.")] = 1,
    baseline: Annotated[str | None, typer.Option(metavar="NAME", help="The method to compare others with.")] = None,
    per_label: Annotated[int | None, typer.Option(min=1, help="Training rows a label.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Training rows a task.")] = None,
    eval_rows: Annotated[int | None, typer.Option(min=1, help="Test rows a task.")] = None,
    memory: Annotated[str, typer.Option(metavar="N|N%", help="Memory size.")] = "auto",
    epochs: Annotated[float, typer.Option(help="Passes over each task's rows.")] = 3,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a hub name.")] = None,
    general: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts for perplexity; general questions are asked as well.")
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASKS", help="Tasks of lm-evaluation-harness: names or YAML files.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep runs here, to go on or read them back.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write table, plot, matrices and JSON here.")] = None,
    as_json: AsJson = False,
) -> None:
    """A stream of tasks through several methods, several seeds and orders, on the same rows and epochs."""
    from treering.bench.entries import METHODS, parse
    from treering.bench.outputs import table, write_all
    from treering.bench.quality import Bench, run_quality
    from treering.bench.stream import Stream

    if per_label and rows:
        raise typer.BadParameter("give --per-label or --rows, not both")
    numbers = tuple(dict.fromkeys(seed.strip() for seed in seeds.split(",") if seed.strip()))
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(f"--seeds is {seeds!r}; write whole numbers separated by commas, such as 1,2,3")
    found = run_quality(
        Bench(
            Stream(data, per_label, rows, eval_rows),
            tuple(map(int, numbers)),
            orders,
            memory,
            epochs,
            model,
            baseline,
            general,
            tuple(task.strip() for task in (lm_eval or "").split(",") if task.strip()),
            tuple(settings or ()),
        ),
        parse(",".join(METHODS) if methods is None else methods),
        work,
    )
    if out is not None:
        write_all(found, out)
    output(found, as_json, table(found) if not as_json else [])
