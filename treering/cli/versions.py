"""What there is, and which version serves."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from treering.cli.common import HERE, AsJson, Folder, app, choices, matrix, opened, output, percent
from treering.errors import UsageError


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
    """All versions as a tree, each below the one it was trained from."""
    from treering import overview

    found = overview.list_versions(opened(workspace))
    lines = []
    for depth, v in overview.family(found["versions"], found["current"]):
        names = [*v["aliases"], *(f"#{tag}" for tag in v["tags"]), *(["pruned"] if v["pruned"] else [])]
        lines.append(
            f"{'*' if v['name'] == found['current'] else ' '} {'   ' * (depth - 1) + '└─ ' if depth else ''}"
            f"{v['name']:5} from {v['parent'] or 'base':5} {v['created']}  average {percent(v['average_accuracy'])}  "
            f"forgetting {percent(v['forgetting'])}  {'[' + ', '.join(names) + ']  ' if names else ''}{v['verdict']}"
        )
    output(found, as_json, lines or ["no version yet"])


@app.command()
def show(
    version: Annotated[str, typer.Argument(metavar="vN")], workspace: Folder = HERE, as_json: AsJson = False
) -> None:
    """Everything a version says of itself."""
    from treering import registry, remarks

    ws = opened(workspace)
    found = registry.get(ws, version)
    said = remarks.read(ws.root).of(found.name)
    report = found.folder / "report.html"  # An adopted version has none.
    manifest = {**found.manifest, "report": str(report) if report.exists() else None, **said}
    verdict = found.manifest["verdict"]
    lines = [f"{found.name}, from {found.parent or 'the base model'}, {manifest['created']}: {verdict['summary']}"]
    lines += [f"  {j['name']}: {j['reason']}" for j in verdict["judgements"]]
    lines += [f"{kind}: {', '.join(said[kind])}" for kind in ("aliases", "tags") if said[kind]]
    lines += [f"note of {note['time']}: {note['text']}" for note in said["notes"]]
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
def gate(
    version: Annotated[str, typer.Argument(metavar="vN")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings of the gate to try.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say the verdict, and leave current.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Judge a version again, by the policy as it is now, and promote it if it passes. Exit code 2: held."""
    from treering import registry, verdicts

    ws = opened(workspace)
    found, config = registry.get(ws, version), ws.config(settings or ())
    if settings and not dry_run:
        raise UsageError("what passes by settings of one command is not promoted: add --dry-run, or write them down")
    rival = verdicts.rival(ws, found)
    verdict = verdicts.judged(ws, found, config)
    can = verdict.promote and not dry_run and registry.current(ws) != found
    if can:
        ws.promote(found.name, passed=True)
    against = rival.name if rival else "base"
    result = {"version": found.name, "against": against, "promoted": can, **verdict.as_dict()}
    lines = [f"{found.name} against {against}: {verdict.summary}"]
    lines += [f"  {j.name}: {j.reason}" for j in verdict.judgements]
    output(result, as_json, lines + ([f"{found.name} is current"] if can else []))
    if not verdict.promote:
        raise typer.Exit(2)


@app.command()
def alias(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The alias; with none, all are told.")] = None,
    version: Annotated[str | None, typer.Argument(metavar="[vN]", help="What it is to name; `current` may be.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Have it name nothing any more.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Name a version, such as `champion`; a name can be moved to another version."""
    from treering import registry, remarks

    ws = opened(workspace)
    if name is not None and delete == (version is not None):
        raise UsageError("give the alias and a version, or the alias and --delete")
    if name is not None:
        with ws.changing("alias"):
            remarks.set_alias(ws.root, name, None if version is None else registry.get(ws, version).name)
    found = remarks.read(ws.root).aliases
    output({"aliases": found}, as_json, [f"{one}: {found[one]}" for one in sorted(found)] or ["no alias yet"])


@app.command()
def tag(
    version: Annotated[str, typer.Argument(metavar="vN")],
    name: Annotated[str, typer.Argument(metavar="TAG")],
    delete: Annotated[bool, typer.Option("--delete", help="Take it off.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Put a tag on a version; many may bear the same."""
    from treering import registry, remarks

    ws = opened(workspace)
    with ws.changing("tag"):
        found = registry.get(ws, version).name
        remarks.set_tag(ws.root, found, name, not delete)
    tags = remarks.read(ws.root).of(found)["tags"]
    output({"version": found, "tags": tags}, as_json, [f"{found}: {', '.join(tags) or 'no tag'}"])


@app.command()
def note(
    version: Annotated[str, typer.Argument(metavar="vN")],
    text: Annotated[str, typer.Argument(metavar="TEXT")],
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Add a note to a version; `treering show` tells all."""
    from treering import registry, remarks

    ws = opened(workspace)
    with ws.changing("note"):
        found = registry.get(ws, version).name
        remarks.add_note(ws.root, found, text)
    notes = remarks.read(ws.root).of(found)["notes"]
    output({"version": found, "notes": notes}, as_json, [f"{one['time']}: {one['text']}" for one in notes])


@app.command()
def rollback(
    version: Annotated[str | None, typer.Argument(metavar="[vN]")] = None,
    quarantine_data: Annotated[
        bool, typer.Option("--quarantine-data", help="Put the rows learned since into quarantine.")
    ] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Go back to the version promoted before, or to the one named."""
    found = opened(workspace).rollback(version, quarantine_data=quarantine_data)
    name = found.name if found else None
    after = "rows learned since are new again for `treering update`; by itself nothing learns them again"
    if quarantine_data:
        after = "rows learned since are in quarantine; `treering quarantine release` takes them back"
    output({"current": name}, as_json, [f"{name or 'the base model'} serves; {after}"])


@app.command()
def prune(
    keep: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many stay whole for being the newest; keep_versions.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and let it be.")] = False,
    workspace: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Leave only the records of old versions: manifest, results, log and report."""
    from treering import prune as pruning

    ws = opened(workspace)
    last = keep or ws.config().keep_versions
    if last is None:
        raise UsageError("say how many stay whole: --keep N, or keep_versions in treering.yaml")
    with nullcontext() if dry_run else ws.lock("prune", "update"):  # An update may link to what its parent has.
        freed = pruning.prune(ws, last, dry_run=dry_run)
    stay = pruning.kept(ws, last)
    lines = [f"{name} stays whole: it {why}" for name, why in stay.items()]
    done = "would keep" if dry_run else "keeps"
    lines += [f"{name} {done} its records alone: {size / 2**20:.1f} MB freed" for name, size in freed.items()]
    output({"pruned": freed, "kept": stay}, as_json, lines or ["no version yet"])


@app.command()
def verify(workspace: Folder = HERE, as_json: AsJson = False) -> None:
    """Check every version against its hashes. Exit code 1: something was changed."""
    from treering import overview

    found = overview.verify(opened(workspace))
    output(found, as_json, found["problems"] or [f"{found['versions']} versions, all as they were made"])
    if not found["ok"]:
        raise typer.Exit(1)
