"""Versions that nobody needs any more keep their records, and give their weights, memory and state back to the disk.

What a version was, what it learned, how it scored and why it was promoted or held can still be told, and the versions
that were trained from it stay what they are. It can no longer serve, or be what an update begins with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from treering import canary, registry, remarks
from treering.errors import TreeringError
from treering.files import timestamp
from treering.registry import MANIFEST, Version
from treering.results import BEST, PARENT_RESULTS, RESULTS

if TYPE_CHECKING:
    from treering.workspace import Workspace

RECORDS = (RESULTS, PARENT_RESULTS, BEST, "log.jsonl", "report.html")
"""What stays of a version, beside its manifest."""


def kept(ws: Workspace, last: int) -> dict[str, str]:
    """The versions that stay whole, each with the reason: current, the ones a rollback would go back to, named ones.

    `last`: how many versions of those that were promoted, and how many of all, stay for being the newest.
    """
    there = {version.name: version for version in registry.readable(ws) if not version.pruned}
    here = registry.current(ws)
    found = dict[str, str]()
    for name in reversed(registry.promoted(ws)[-last:]):
        found[name] = "is current" if here and here.name == name else f"is one of the last {last} that were promoted"
    for name in list(there)[-last:]:
        found.setdefault(name, f"is one of the last {last}")
    for alias, name in remarks.read(ws.root).aliases.items():
        found.setdefault(name, f"has the alias {alias}")
    with_best = best(list(there.values()), here)
    if with_best is not None:
        found.setdefault(with_best.name, "has the best average score")
    tried = _on_trial(ws)
    if tried is not None:
        found.setdefault(tried, "is on trial")
    return {name: why for name, why in found.items() if name in there}


def best(versions: Sequence[Version], current: Version | None) -> Version | None:
    """The one with the highest mean score over the tasks that `current` knows, of those that know them all."""
    tasks = current.scores.keys() if current else set[str]()
    known = [version for version in versions if version.scores.keys() >= tasks and version.scores]
    return max(known, key=lambda v: sum(v.scores[t] for t in tasks or v.scores) / len(tasks or v.scores), default=None)


def prune(ws: Workspace, last: int, *, dry_run: bool = False) -> dict[str, int]:
    """Leave only the records of all versions but those `kept`; returns the bytes that each frees, or would.

    Raises `VersionError` where one was changed since it was made: it stays as it is, with all that come after it.
    """
    stay, freed = kept(ws, last), dict[str, int]()
    for version in registry.readable(ws):
        if version.name in stay or version.pruned:
            continue
        size = _freed(version)
        if not dry_run:
            version.check_files()  # Hashing may take long; nobody has to wait for it.
            with ws.changing("prune"):
                if version.name in kept(ws, last):  # By now it may be current, or have a name.
                    continue
                _prune(version)
        freed[version.name] = size
    return freed


def _prune(version: Version) -> None:
    """Put its records in its place."""
    new = registry.replacing(version)
    new.mkdir()
    for name in RECORDS:
        if (version.folder / name).exists():
            os.link(version.folder / name, new / name)
    registry.exchange(version, {**version.manifest, "pruned": timestamp()})


def _freed(version: Version) -> int:
    """Bytes of files that no other version has as well."""
    return sum(stat.st_size for stat in _stats(version.folder) if stat.st_nlink == 1)


def _stats(folder: Path) -> Iterator[os.stat_result]:
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (*RECORDS, MANIFEST):
            yield path.stat()


def _on_trial(ws: Workspace) -> str | None:
    try:
        tried = canary.running(ws.root)
    except TreeringError:
        return None  # Damaged: then no version is on trial.
    return tried.version if tried else None
