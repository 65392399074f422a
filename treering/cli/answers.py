"""Using a version: score it, answer a file, talk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from treering.cli.common import HERE, AsJson, Folder, app, find_version, opened, output, percent


@app.command()
def evaluate(
    version: Annotated[str | None, typer.Argument(metavar="[vN]", help="Else current, or the base model.")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Rows with answers; else the held-out rows.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only this task, or the name to give --data.")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Score a version."""
    from treering import answers

    ws = opened(workspace)
    found = answers.score(ws, find_version(ws, version), data=data, task=task)
    lines = [
        f"{name}: {percent(row['score'])} ({row['metric']}, {row['rows']} rows), loss {row['loss']:.3f}"
        + "".join(f", {measure} {percent(value)}" for measure, value in row.get("measures", {}).items())
        for name, row in found["tasks"].items()
    ]
    output(found, as_json, [f"{found['version']}:", *lines, *(f"left out: {q}" for q in found["quarantined"])])


@app.command()
def predict(
    source: Annotated[Path, typer.Option("--input", metavar="FILE", help="Rows in any known format.")],
    target: Annotated[Path, typer.Option("--output", metavar="FILE", help="JSON Lines to write.")],
    version: Annotated[str | None, typer.Argument(metavar="[vN]")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Answer every row of a file."""
    from treering import answers

    ws = opened(workspace)
    found = answers.predict(ws, find_version(ws, version), source, target)
    lines = [f"{found['version']} answered {found['rows']} rows: {found['output']}"]
    output(found, as_json, lines + [f"left out: {q}" for q in found["quarantined"]])


@app.command()
def chat(
    version: Annotated[str | None, typer.Argument(metavar="[vN]")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Talk to a version. With --json: one message on standard input, one object out."""
    from treering.answers import Answerer
    from treering.data.example import Message

    ws = opened(workspace)
    loaded = Answerer(ws, find_version(ws, version))
    system = [Message("system", loaded.config.default_system)] if loaded.config.default_system else []
    if as_json:
        answer = loaded.answer([[*system, Message("user", sys.stdin.read().strip())]])[0]
        output({"version": loaded.name, "answer": answer}, as_json, [])
        return
    print(f"{loaded.name}; an empty line ends the chat", file=sys.stderr)
    turns = list(system)
    for line in _lines():
        turns.append(Message("user", line))
        turns.append(Message("assistant", loaded.answer([turns])[0]))
        print(turns[-1].content, flush=True)


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
