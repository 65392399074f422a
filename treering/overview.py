"""What the workspace looks like now, and how two versions differ; reads files only, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from treering import registry, remarks
from treering.errors import TreeringError
from treering.registry import Version

if TYPE_CHECKING:
    from treering.workspace import Workspace


def status(ws: Workspace) -> dict[str, Any]:
    """What serves, what waits, what is stored."""
    here = registry.current(ws)
    waiting = ws.catalog.waiting(registry.known(ws, here))
    given_back = registry.given_back(ws)
    rolled_back = {task: sum(id in given_back for id in ids) for task, ids in waiting.items()}
    return {
        "workspace": str(ws.root),
        "current": here.name if here else None,
        "scores": here.scores if here else {},
        "waiting": {task: len(ids) for task, ids in waiting.items()},
        "rolled_back": {task: count for task, count in rolled_back.items() if count},
        "inbox": unread(ws),
        "rows": ws.catalog.counts(),
        "versions": len(registry.versions(ws)),
        "interrupted": any(not folder.name.startswith(registry.TRIED) for folder in ws.versions.glob(".staging-*")),
        "automation": _automation(ws),
    }


def _automation(ws: Workspace) -> dict[str, Any]:
    """How far `treering watch` is; `problem`: why it does nothing any more."""
    from treering.automate.state import State

    try:
        state = State.load(ws.root)
    except TreeringError as error:
        return {"problem": str(error), "running": False, "updates_today": 0, "minutes_today": 0.0}
    today = state.day == datetime.now().astimezone().date()
    return {
        "problem": state.stopped,
        "running": state.running is not None,
        "updates_today": state.updates if today else 0,
        "minutes_today": round(state.seconds / 60, 1) if today else 0.0,
    }


def unread(ws: Workspace) -> list[str]:
    """Files of the inbox that were not ingested as they are now."""
    from treering.data.read import find_files
    from treering.files import printable

    if not ws.inbox.is_dir():
        return []
    files = find_files(ws.inbox)
    return [printable(str(f.relative_to(ws.inbox))) for f in files if not ws.catalog.took(f.resolve())]


def list_versions(ws: Workspace) -> dict[str, Any]:
    """All versions, oldest first, and which is current."""
    here, said = registry.current(ws), remarks.read(ws.root)
    rows = [
        {
            "name": version.name,
            "parent": version.parent,
            "created": version.manifest["created"],
            "promote": version.promote,
            "verdict": version.summary,
            "average_accuracy": version.manifest["summary"].get("average_accuracy"),
            "forgetting": version.manifest["summary"].get("forgetting"),
            "rows": len(version.rows),
            "pruned": version.pruned,
            **said.of(version.name),
        }
        for version in registry.readable(ws)
    ]
    return {"versions": rows, "current": here.name if here else None}


def family(rows: Sequence[Mapping[str, Any]], current: str | None) -> list[tuple[int, Mapping[str, Any]]]:
    """The versions as a tree: each of `rows` (`list_versions`) below its parent, with how far it is from the stem.

    The stem leads to `current`, and from there to what was promoted last. What branches off stands before it goes on.
    """
    by_name = {row["name"]: row for row in rows}
    children: dict[str | None, list[Mapping[str, Any]]] = {}
    for row in rows:
        children.setdefault(row["parent"] if row["parent"] in by_name else None, []).append(row)
    stem, name = set[str | None](), current
    while name in by_name:
        stem.add(name)
        name = by_name[name]["parent"]
    found, left = list[tuple[int, Mapping[str, Any]]](), list[tuple[int, Mapping[str, Any]]]()
    depth, name = 0, None
    while True:
        born = children.get(name, [])
        on = ([row for row in born if row["name"] in stem] or [row for row in born if row["promote"]])[-1:]
        left += [*((depth, row) for row in on), *((depth + 1, row) for row in reversed(born) if row not in on)]
        if not left:
            return found
        depth, row = left.pop()
        found.append((depth, row))
        name = row["name"]


def compare(ws: Workspace, first: Version, second: Version) -> dict[str, Any]:
    """Per task: both scores, their difference with its bounds, and the flips, on the rows both were scored on."""
    from treering.gate import paired
    from treering.results import read_results

    for version in (first, second):
        version.check_files()
    before, after = (
        {r.id: r for r in read_results(v.folder / "results.parquet")} if v.manifest["scores"] else {}
        for v in (first, second)
    )
    config = ws.config()
    tasks = {}
    for task in dict.fromkeys([*first.scores, *second.scores]):
        pairs = [(before[id], r) for id, r in after.items() if r.task == task and id in before]
        found: dict[str, Any] = {first.name: first.scores.get(task), second.name: second.scores.get(task)}
        if pairs:
            bounds = paired(task, pairs, config.gate, config.seed)
            found |= {"difference": bounds["change"], "lower": bounds["lower"], "upper": bounds["upper"]}
        found |= {
            "rows": len(pairs),
            "lost": sorted(r.id for was, r in pairs if was.score == 1 and r.score < 1),
            "gained": sorted(r.id for was, r in pairs if was.score < 1 and r.score == 1),
        }
        tasks[task] = found
    settings = {
        key: [first.manifest["config"].get(key), second.manifest["config"].get(key)]
        for key in {**first.manifest["config"], **second.manifest["config"]}
        if first.manifest["config"].get(key) != second.manifest["config"].get(key)
    }
    return {"versions": [first.name, second.name], "tasks": tasks, "settings": settings}


def verify(ws: Workspace) -> dict[str, Any]:
    """Check every version's files against its manifest, `current` against the versions, remarks and the catalog."""
    problems = [problem for version in registry.versions(ws) for problem in version.problems()]
    try:
        registry.current(ws)
    except TreeringError as error:
        problems.append(str(error))
    try:
        remarks.read(ws.root)
    except TreeringError as error:
        problems.append(str(error))
    try:
        ws.catalog.check()
    except TreeringError as error:
        problems.append(str(error))
    return {"ok": not problems, "versions": len(registry.versions(ws)), "problems": problems}
