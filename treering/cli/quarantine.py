"""`treering quarantine`: rows that were refused, and what to do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from treering.cli.common import HERE, AsJson, Folder, app, opened, output
from treering.errors import UsageError

SHOWN = 100
"""Rows that `list` prints; `--json` has all."""

commands = typer.Typer(no_args_is_help=True, help="Rows that were refused, each with its rule and reason.")
app.add_typer(commands, name="quarantine")

Rule = Annotated[str | None, typer.Option("--rule", help="Those of one rule.")]
Task = Annotated[str | None, typer.Option("--task", help="Those of one task.")]
Number = Annotated[int, typer.Argument(help="The row's number in `quarantine list`.", metavar="NUMBER")]


@commands.command("list")
def list_(rule: Rule = None, task: Task = None, workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """List them, with file, line, rule and reason."""
    from treering.data import quarantine

    found = quarantine.listed(opened(workspace), rule, task)
    lines = [f"{name}: {count}" for name, count in quarantine.rules(found).items()] or ["quarantine is empty"]
    lines += [f"  {e['number']}  {e['file']}, line {e['line']}: {e['rule']}: {e['reason']}" for e in found[:SHOWN]]
    lines += [f"  and {len(found) - SHOWN} more; --json has all"] if len(found) > SHOWN else []
    output({"rules": quarantine.rules(found), "rows": found}, as_json, lines)


@commands.command()
def show(number: Number, workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """Show one of them whole."""
    from treering.data import quarantine

    found = quarantine.get(opened(workspace), number)
    lines = [f"{key}: {found[key]}" for key in ("task", "file", "line", "rule", "reason", "added")]
    turns = [f"{turn['role']}: {turn['content']}" for turn in found["messages"] or ()]
    output(found, as_json, lines + (turns or [found["raw"]]))


@commands.command()
def fix(
    number: Number,
    record: Annotated[str, typer.Argument(help="The corrected row as JSON, in any known shape.", metavar="JSON")],
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Take a corrected row in its place."""
    from treering.data import quarantine

    try:
        row: Any = json.loads(record)
    except ValueError as error:
        raise UsageError(f"the corrected row is no JSON ({error}): {record[:80]}") from None
    _taken(quarantine.fix(opened(workspace), number, row), as_json)


@commands.command()
def release(
    numbers: Annotated[list[int], typer.Argument(help="Their numbers in `quarantine list`.", metavar="NUMBER ...")],
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Take rows in as they are."""
    from treering.data import quarantine

    _taken(quarantine.release(opened(workspace), numbers), as_json)


@commands.command()
def export(
    file: Annotated[Path, typer.Argument(help="The JSON Lines file to write.", metavar="FILE")],
    rule: Rule = None,
    task: Task = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Write them to a file, to be corrected and ingested."""
    from treering.data import quarantine

    count = quarantine.export(opened(workspace), file, rule, task)
    output({"rows": count, "file": str(file)}, as_json, [f"{count} rows written to {file}"])


def _taken(done: Any, as_json: bool) -> None:
    lines = [f"{done.accepted} accepted ({done.held_out} held out), {done.duplicates} duplicates"]
    lines += [f"{done.superseded} older rows no longer count"] if done.superseded else []
    lines += [f"{done.withdrawn} older rows went to quarantine"] if done.withdrawn else []
    output(done.as_dict(), as_json, lines)
