"""The main job: make a workspace, take rows in, update, by hand or by itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treering.cli.common import HERE, AsJson, Folder, app, choices, cost, matrix, needs, opened, output
from treering.files import one_line

if TYPE_CHECKING:
    from treering.data.intake import Ingested

ROWS_TOLD = 10
"""Quarantined rows that are printed one by one."""

Launcher = Annotated[
    str | None, typer.Option(help="What starts the processes that train: local, accelerate or ray; sets launcher.")
]
Processes = Annotated[int | None, typer.Option(help="How many train together; sets processes.")]

_ROOM = {"memory_mb": "memory", "gpu_memory_mb": "GPU memory", "disk_mb": "disk"}


@app.command()
def init(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="Folder of the new workspace.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a hub name.")] = None,
    adapter: Annotated[Path | None, typer.Option(metavar="PEFT_FOLDER", help="An adapter that becomes v1.")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="CONFIG.yaml", help="Take settings from here.")
    ] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a workspace."""
    from treering.importers import Imported, read_config
    from treering.workspace import Workspace, adapter_settings

    imported = read_config(source) if source else Imported()
    adapter = adapter or imported.adapter
    settings = imported.settings | ({"model_name_or_path": model} if model else {})
    for key, value in adapter_settings(adapter).items() if adapter else ():
        if settings.get(key, value) != value:
            imported.left[key] = f"updates go on with the adapter, which has {value}"
            del settings[key]
    base = settings.get("model_name_or_path")
    if base and Path(base).is_dir():
        # A path relative to here would mean nothing to a command that is run elsewhere.
        settings["model_name_or_path"] = str(Path(base).resolve())
    ws = Workspace.create(directory or workspace, adapter=adapter, **settings)
    from treering import registry

    current = registry.current(ws)
    result = {
        "workspace": str(ws.root),
        "settings": settings,
        "not_carried": imported.left,
        "version": current.name if current else None,
    }
    lines = [f"made {ws.root}"]
    lines += [f"{key}: {value}" for key, value in settings.items()]
    lines += [f"not carried over: {key} ({why})" for key, why in imported.left.items()]
    lines += [f"{adapter} is {current.name}"] if current else []
    lines += [f"next: put files into {ws.inbox}/<task>/ and run `treering update`"]
    output(result, as_json, lines)


@app.command()
def ingest(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Files, folders, s3:// or hf:// URLs, - for input; else the inbox."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task of all rows; else told by the folder.")] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", metavar="PATH", help="Rows to judge by, never trained.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="What the files are: csv, alpaca, ..., or csv,alpaca; else recognised.")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="KEY=COLUMN,...", help="Which columns to take: question=frage,answer=antwort.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a LLaMA-Factory dataset_info.json, this one alone.")
    ] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Take rows in: read, check, deduplicate, store."""
    ws = opened(workspace)
    done = ws.ingest(
        paths or None, task=task, held_out=held_out, format=format, columns=columns, dataset=dataset, quiet=False
    )
    output(done.as_dict(), as_json, _taken(done))


def _taken(done: Ingested) -> list[str]:
    lines = [
        f"{done.rows} rows: {done.accepted} accepted ({done.held_out} held out), "
        f"{done.duplicates} duplicates, {done.quarantined} quarantined"
    ]
    lines += [f"  {task}: {count}" for task, count in done.tasks.items()]
    lines += [f"  {done.near} of the duplicates say nearly the same as another row"] if done.near else []
    lines += [f"  {_replaced(**entry)}" for entry in done.replaced]
    lines += [f"  {done.restored} of the accepted ones no longer counted, and are said anew"] if done.restored else []
    lines += (
        [f"  {done.withdrawn} older rows say nearly what a held-out one says; they went to quarantine"]
        if done.withdrawn
        else []
    )
    lines += [f"  mended by {rule}: {count}" for rule, count in done.mended.items()]
    lines += [f"  warned of by {rule}: {count}" for rule, count in done.warned.items()]
    lines += [f"  note: {notice}" for notice in done.notices]
    lines += [f"  quarantined by {rule}: {count}" for rule, count in done.reasons.items()]
    lines += [f"  {row['file']}, line {row['line']}: {row['reason']}" for row in done.refused[:ROWS_TOLD]]
    more = done.quarantined - ROWS_TOLD
    lines += [f"  and {more} more; --json has the first 100"] if more > 0 else []
    return [one_line(line) for line in lines]


def _replaced(task: str, by: str, rows: int, held_out: int) -> str:
    """That rows of `task` no longer count because of others `by` name, and what to do where that was not meant."""
    lost = f"{rows} older row{'' if rows == 1 else 's'} of {task}" + (
        f" ({held_out} of them held out)" * (held_out > 0)
    )
    if task == by:
        said = f"{lost} no longer count: newer ones answer the same with something else"
        return said + f"; {_keeping(task)} would keep both" * (held_out > 0)
    return (
        f"{lost} NO LONGER COUNT, for rows of {by} answer the same with something else; where both are true, set "
        f"{_keeping(task, by)} and ingest the rows of {task} once more, from a file of another name"
    )


def _keeping(*tasks: str) -> str:
    """The setting by which they keep all answers."""
    policies = ", ".join(f"{json.dumps(task, ensure_ascii=False)}: keep-both" for task in tasks)
    return f"dedup: {{contradictions: {{{policies}}}}}"


@app.command()
def plan(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings for that update.")
    ] = None,
    launcher: Launcher = None,
    processes: Processes = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Say what the next update will do and need; run none. Exit code 1: it will not fit."""
    from treering.forecast import forecast

    found = forecast(opened(workspace), [*(settings or ()), *_spread(launcher, processes)])
    shown, estimate = found.plan.as_dict(), found.estimate
    result = {
        **shown,
        "ingested": found.ingested.as_dict(),
        "estimate": asdict(estimate) if estimate else None,
        "room": found.room,
        "problems": found.problems,
    }
    if estimate is None:
        output(result, as_json, ["nothing new: every training row has been learned; put new files into the inbox"])
        return
    lines = [f"an update of {shown['parent'] or 'the base model'}"]
    lines += [f"  {task}: {count} new rows" for task, count in shown["rows"].items()]
    lines += (
        [f"  {found.ingested.quarantined} rows of the inbox would be refused"] if found.ingested.quarantined else []
    )
    lines += [f"  at most {estimate.rows_written} rows that the parent writes"] if estimate.rows_written else []
    most = "at most " if shown["config"]["early_stopping_steps"] or estimate.rows_written else ""
    lines += [f"{most}{estimate.steps} steps, {estimate.rows_trained} rows with repeats and replayed ones"]
    lines += [f"needs: {needs(result['estimate'])}, {estimate.disk_mb:,.0f} MB of disk"]
    lines += ["free: " + ", ".join(f"{value:,.0f} MB of {_ROOM[name]}" for name, value in found.room.items())]
    lines += [f"it will not fit: {problem}" for problem in found.problems]
    output(result, as_json, lines)
    if found.problems:
        raise typer.Exit(1)


def _spread(launcher: str | None, processes: int | None) -> list[str]:
    """The options as settings."""
    given = {"launcher": launcher, "processes": processes}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


@app.command()
def update(
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings for this update.")
    ] = None,
    no_promote: Annotated[bool, typer.Option("--no-promote", help="Keep the candidate, leave current.")] = False,
    launcher: Launcher = None,
    processes: Processes = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Run one update over everything new. Exit code 2: held by the gate."""
    from treering import pipeline

    overrides = [*(settings or ()), *_spread(launcher, processes)]
    outcome = pipeline.update(opened(workspace), overrides, promote=not no_promote)
    version = outcome.version
    result: dict[str, Any] = {
        "status": outcome.status,
        "reason": outcome.reason,
        "version": version.name if version else None,
    }
    head = version.name if version and outcome.reason == version.summary else f"{outcome.status}:"
    lines = [f"{head} {outcome.reason}"]
    if outcome.ingested is not None and outcome.ingested.rows:
        result["ingested"] = outcome.ingested.as_dict()
        lines = [*_taken(outcome.ingested), *lines]
    if version is not None:
        result |= {"scores": version.scores, "verdict": version.manifest["verdict"]}
        result |= {"cost": version.manifest["cost"], "estimate": version.manifest["estimate"]}
        result["report"] = str(version.folder / "report.html")
        lines += choices(version) + matrix(version) + cost(version) + [f"report: {result['report']}"]
    output(result, as_json, lines)
    if version is not None and (not version.promote or (outcome.status == "held" and not no_promote)):
        raise typer.Exit(2)


@app.command()
def watch(
    once: Annotated[bool, typer.Option("--once", help="Do what there is to do now, then end.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after failures stopped it.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Update by itself when files come or it is time. Exit code 1: failures stopped it."""
    from treering.automate import loop
    from treering.errors import LockError
    from treering.stop import stop_on_signals

    ws = opened(workspace)
    resumed = resume and loop.resume(ws)
    automation = loop.Automation(ws)
    try:
        with stop_on_signals() as stop:
            ended: str = automation.run(stop, once=once, retry=resume)
    except LockError:
        if not resumed:
            raise
        ended = "resumed"  # By the loop that runs already.
    from treering import registry

    current = registry.current(ws)
    result = {"ended": ended, "reason": automation.state.stopped, "current": current.name if current else None}
    serves = f"{current.name} is current" if current else "no version yet"
    output(result, as_json, [f"{ended}: {automation.state.stopped or serves}"])
    if ended in ("stopped", "failed"):
        raise typer.Exit(1)
