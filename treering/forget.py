"""Delete rows on request, from wherever they are; and teach again what was learned beside them, without them.

The tombstones are set first. From then on the deletion is decided, and can be finished by anybody at any time: whatever
of the workspace bears one of them goes. So a crash in the middle is made good by the next command.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.data import export, index
from treering.data.erase import erase, like
from treering.data.example import Example
from treering.data.tombstones import Tombstones
from treering.data.where import all_of
from treering.data.writer import HELD
from treering.errors import LockError, UsageError, VersionError, full_disk_is_clear
from treering.files import fsync_folder
from treering.plan import clear
from treering.redact import redact
from treering.workspace import DELETING

if TYPE_CHECKING:
    from treering.registry import Version
    from treering.workspace import Workspace


@dataclass(frozen=True)
class Found:
    """What is to be deleted: `ids` of rows, `numbers` of rows in quarantine, and the `files` that they came from."""

    ids: frozenset[str]
    numbers: frozenset[int]
    files: dict[str, int]


@dataclass(frozen=True)
class Forgotten:
    """What was deleted. `versions`: those that learned some of it, themselves or by an ancestor; `current`: whether the
    one that serves did. `files`: where the rows came from, and how many; they are the user's, and stay. `exports`:
    files that were written anew without them; `kept_exports`: such as may have them still, and why. `damaged`: versions
    that could not be read, and stay as they are.
    """

    rows: int
    versions: list[str]
    current: bool
    files: dict[str, int]
    exports: list[str]
    kept_exports: dict[str, str]
    damaged: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def find(ws: Workspace, ids: Collection[str] | None = None, where: Sequence[str] = ()) -> Found:
    """The rows with these ids, of all if `ids` is None, for which all conditions hold (`data/where.py`).

    Whole ids are wanted. Raises `UsageError` where an id is unknown, or neither ids nor conditions are given.
    """
    if ids is None and not where:
        raise UsageError("say which rows: --ids FILE, --where CONDITION, or both")
    picked, wanted = all_of(where), None if ids is None else {id.strip().lower() for id in ids}
    found, numbers, files = set[str](), set[int](), dict[str, int]()
    met = set[str]()
    for id, number, row in _everything(ws):
        if wanted is not None and id not in wanted:
            continue
        met |= {id} if id else set()
        if picked(row):
            found |= {id} if id else set()
            numbers |= {number} if number is not None else set()
            files[row["file"]] = files.get(row["file"], 0) + 1
    for id in (wanted or set()) - met:
        if not any(id in known for known in _known_to_versions(ws)):
            raise UsageError(f"no row has the id {id!r}; `treering data trace vN --json` has whole ids")
        if not where:
            found.add(id)  # The catalog has lost it, versions have not.
    return Found(frozenset(found), frozenset(numbers), files)


def forget(ws: Workspace, found: Found) -> Forgotten:
    """Delete what was found. Raises `LockError` while an update runs: it holds the rows in memory."""
    with ws.lock("forget", "update"), full_disk_is_clear(ws.root):
        stones = Tombstones(ws.root)
        with ws.catalog.writing() as writer:
            ids = found.ids | set(like(writer, found.ids))
        (ws.root / DELETING).touch()
        fsync_folder(ws.root)
        stones.add(ids)
        return _finish(ws, stones, ids, found)


def finish(ws: Workspace) -> None:
    """Finish a deletion that a crash cut off."""
    with suppress(LockError), ws.lock("forget", "update"), full_disk_is_clear(ws.root):
        _finish(ws, Tombstones(ws.root), frozenset(), Found(frozenset(), frozenset(), {}))


def untaught(ws: Workspace) -> Version | None:
    """The last version of `current`'s line that learned no row that was deleted since; None: only the base model."""
    line = registry.lineage(ws, registry.current(ws))
    return next((version for version in line if not registry.unlearned(ws, version)), None)


def _finish(ws: Workspace, stones: Tombstones, ids: Collection[str], found: Found) -> Forgotten:
    """Have everything in the workspace conform to the tombstones; those of `ids` are told of."""
    clear(ws)  # What an interrupted update left has rows in it.
    with ws.catalog.writing() as writer:
        rows = erase(writer, stones.__contains__, found.numbers)
    with ws.catalog.writing() as writer:
        index.clear(writer.index, writer.runs()[0])
    ws.catalog.flush()
    damaged = []
    with ws.changing("forget"):
        for version in registry.versions(ws):
            try:
                redact(ws, version, stones)
            except VersionError as error:
                damaged.append(f"{version.name}: {error}")
        registry.forget_rows(ws, stones.__contains__)
    exports, kept = export.without(ws, stones.__contains__)
    (ws.root / DELETING).unlink()
    fsync_folder(ws.root)
    here = {stones.of(id) for id in ids}
    taught = [
        version
        for version in registry.readable(ws)
        if any(not ancestor.deleted_rows.isdisjoint(here) for ancestor in registry.lineage(ws, version))
    ]
    current = registry.current(ws)
    return Forgotten(
        rows,
        [version.name for version in taught],
        current is not None and any(version.name == current.name for version in taught),
        found.files,
        exports,
        kept,
        damaged,
    )


def _everything(ws: Workspace) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    """Each stored row and each in quarantine: its id ("" where it is no row), its number there, and what it is."""
    for row in ws.catalog.every():
        yield row["id"], None, row
    for row in ws.catalog.quarantined():
        if row["rule"] == HELD:
            continue  # It is among the stored ones.
        messages = json.loads(row["messages"]) if row["messages"] else None
        yield Example.of(messages).id if messages else "", row["seq"], {**row, "messages": messages}


def _known_to_versions(ws: Workspace) -> Iterator[set[str]]:
    for version in registry.readable(ws):
        yield {*version.rows, *registry.measured(version)}
