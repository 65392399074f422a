"""Where rows came from and where they went: one row's whole story, and what a version learned."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.errors import UsageError

if TYPE_CHECKING:
    from treering.registry import Version
    from treering.workspace import Workspace

SHORTEST = 6
"""Digits of an id that are enough where they name one row."""


def story(ws: Workspace, id: str) -> dict[str, Any]:
    """All that is known of the row with this id, or of the one whose id begins so.

    `where` is `train`, `held_out`, `superseded` (a newer row answers the same with something else) or `aside` (in
    quarantine since a version was held); `versions` learned it, `judged` were scored on it, `memory` names those that
    remember it; `likes` were left out because of it. Raises `UsageError` where it names none, or several.
    """
    [found] = ws.catalog.rows([_whole(ws, id)])
    versions = registry.readable(ws)
    return {
        **found,
        "versions": [version.name for version in versions if found["id"] in version.rows],
        "judged": [version.name for version in versions if found["id"] in registry.measured(version)],
        "memory": [version.name for version in versions if _remembers(version, found["id"])],
        "likes": ws.catalog.likes(found["id"]),
    }


def trace(ws: Workspace, version: Version) -> dict[str, Any]:
    """The rows that `version` learned: how many of each task and file, and each with its task, file and line."""
    rows = ws.catalog.rows([id for ids in version.manifest["rows"].values() for id in ids])
    return {
        "version": version.name,
        "tasks": {task: len(ids) for task, ids in version.manifest["rows"].items()},
        "files": dict(Counter(row["file"] for row in rows)),
        "rows": [{key: row[key] for key in ("id", "task", "file", "line", "added")} for row in rows],
    }


def _whole(ws: Workspace, id: str) -> str:
    ids = ws.catalog.beginning(id) if len(id) >= SHORTEST else []
    if len(ids) != 1:
        why = f"{len(ids)} rows begin so" if ids else "no row has it" if len(id) >= SHORTEST else "it is too short"
        raise UsageError(f"{id} names no row: {why}; `treering data trace vN --json` has ids")
    return ids[0]


def _remembers(version: Version, id: str) -> bool:
    path = version.folder / "memory.json"  # The rest of it, teachers' logits, is not needed here.
    return path.exists() and any(row[0] == id for row in json.loads(path.read_text(encoding="utf-8"))["rows"])
