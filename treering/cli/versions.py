"""What there is, and which version serves."""

from __future__ import annotations

from typing import Annotated

import typer

from treering.cli.common import HERE, AsJson, Folder, app, choices, matrix, opened, output, percent


@app.command()
def status(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """What serves, what waits, what is stored."""
    from treering import overview

    found = overview.status(opened(workspace))
    lines = [f"{found['workspace']}: {found['current'] or 'no version yet'} is current, {found['versions']} versions"]
    lines += [f"  {task}: {percent(value)}" for task, value in found["scores"].items()]
    back = found["rolled_back"]
    lines += [
        f"waiting: {task}, {count} rows" + (f", {back[task]} of them rolled back" if task in back else "")
        for task, count in found["waiting"].items()
    ] or ["nothing waits"]
    lines += [f"in the inbox, not ingested yet: {name}" for name in found["inbox"]]
    lines += ["stored: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["rows"].items())]
    lines += (
        ["an update runs or was interrupted; `treering update` resumes an interrupted one"]
        if found["interrupted"]
        else []
    )
    automation = found["automation"]
    if automation["problem"] is not None:
        lines += [f"UPDATES BY THEMSELVES HAVE STOPPED: {automation['problem']}"]
    elif automation["running"] or automation["updates_today"]:
        lines += [
            f"by itself today: {automation['updates_today']} updates, {automation['minutes_today']:g} minutes"
            + (", one runs" if automation["running"] else "")
        ]
    output(found, as_json, lines)


@app.command()
def history(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """What happened here, newest last: updates by themselves, promotions, rollbacks."""
    from treering.automate import events

    found = events.history(opened(workspace))
    output({"events": found}, as_json, [events.describe(entry) for entry in found] or ["nothing happened yet"])


@app.command()
def versions(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """All versions, oldest first."""
    from treering import overview

    found = overview.list_versions(opened(workspace))
    lines = [
        f"{'*' if v['name'] == found['current'] else ' '} {v['name']:5} from {v['parent'] or 'base':5} {v['created']}  "
        f"average {percent(v['average_accuracy'])}  forgetting {percent(v['forgetting'])}  {v['verdict']}"
        for v in found["versions"]
    ]
    output(found, as_json, lines or ["no version yet"])


@app.command()
def show(
    version: Annotated[str, typer.Argument(metavar="vN")], workspace: Folder = HERE, as_json: AsJson = False
) -> None:
    """Everything a version says of itself."""
    from treering import registry

    found = registry.get(opened(workspace), version)
    report = found.folder / "report.html"  # An adopted version has none.
    manifest = {**found.manifest, "report": str(report) if report.exists() else None}
    verdict = found.manifest["verdict"]
    lines = [f"{found.name}, from {found.parent or 'the base model'}, {manifest['created']}: {verdict['summary']}"]
    lines += [f"  {j['name']}: {j['reason']}" for j in verdict["judgements"]]
    lines += choices(found) + matrix(found)
    lines += [
        f"rows learned: {len(found.rows)}; files: {len(manifest['files'])}; report: {manifest['report'] or 'none'}"
    ]
    output(manifest, as_json, lines)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="vA")],
    second: Annotated[str, typer.Argument(metavar="vB")],
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Two versions side by side, on the rows both were scored on."""
    from treering import overview, registry

    ws = opened(workspace)
    found = overview.compare(ws, registry.get(ws, first), registry.get(ws, second))
    a, b = found["versions"]
    lines = []
    for task, row in found["tasks"].items():
        text = f"{task}: {a} {percent(row[a])}, {b} {percent(row[b])}"
        if "difference" in row:
            bounds = f"{100 * row['lower']:+.1f} to {100 * row['upper']:+.1f}"
            text += f", difference {100 * row['difference']:+.1f} ({bounds}) on {row['rows']} rows"
            text += f"; {len(row['lost'])} lost, {len(row['gained'])} gained"
        lines.append(text)
    lines += [f"setting {key}: {a} {old}, {b} {new}" for key, (old, new) in found["settings"].items()]
    output(found, as_json, lines or ["neither version was scored"])


@app.command()
def promote(
    version: Annotated[str, typer.Argument(metavar="vN")],
    force: Annotated[bool, typer.Option("--force", help="Even if the gate held it.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Make a version current."""
    name = opened(workspace).promote(version, force=force).name
    output({"current": name}, as_json, [f"{name} is current"])


@app.command()
def rollback(
    version: Annotated[str | None, typer.Argument(metavar="[vN]")] = None,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Go back to the version promoted before, or to the one named."""
    found = opened(workspace).rollback(version)
    name = found.name if found else None
    after = "rows learned since are new again for `treering update`; by itself nothing learns them again"
    output({"current": name}, as_json, [f"{name or 'the base model'} serves; {after}"])


@app.command()
def verify(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """Check every version against its hashes. Exit code 1: something was changed."""
    from treering import overview

    found = overview.verify(opened(workspace))
    output(found, as_json, found["problems"] or [f"{found['versions']} versions, all as they were made"])
    if not found["ok"]:
        raise typer.Exit(1)
