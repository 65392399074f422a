"""Delete rows on request, from wherever they are; and teach again what was learned beside them, without them.

The tombstones are set first. From then on the deletion is decided, and can be finished by anybody at any time: whatever
of the workspace bears one of them goes. So a crash in the middle is made good by the next command.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.data import export, index
from treering.data.check import opened
from treering.data.erase import erase, known_by
from treering.data.example import Example
from treering.data.intake import DELETED
from treering.data.personal import MASK
from treering.data.tombstones import Tombstones, marks
from treering.data.where import all_of
from treering.data.writer import HELD
from treering.errors import LockError, ModelError, UsageError, VersionError, full_disk_is_clear
from treering.files import fsync_folder, write_file
from treering.plan import clear
from treering.progress import say
from treering.redact import Left, redact
from treering.workspace import DELETING

if TYPE_CHECKING:
    from treering.registry import Version
    from treering.workspace import Workspace

PATIENCE = 5.0
"""Seconds that a deletion waits for whoever reads the catalog as it was before."""

READERS = (
    "somebody still reads treering.db as it was before (a backup, a database browser, another command), which keeps "
    "the deleted texts on disk: have that end, then run any command, as `treering status`; it finishes the deletion"
)
"""What keeps a deletion from its end, and what to do."""

_PAGES = b"pages"
"""In the note of an unfinished deletion: all is deleted, but old pages of the catalog are on disk still."""


@dataclass(frozen=True)
class Found:
    """What is to be deleted, by its `marks` (`data/tombstones.py`): `stored` rows and `refused` ones, in quarantine.

    `alike`: those of them that nobody named, but that say the same as others. `unknown`: those of which quarantine has
    no text, so that they are not known if they come again. `files`: where all came from, and how many. `personal`:
    whether some have personal data, masked or not.
    """

    marks: frozenset[str] = frozenset()
    stored: int = 0
    refused: int = 0
    alike: int = 0
    unknown: int = 0
    files: dict[str, int] = field(default_factory=dict)
    personal: bool = False

    @property
    def rows(self) -> int:
        """All of them."""
        return self.stored + self.refused


@dataclass(frozen=True)
class Forgotten:
    """What was deleted. `versions`: those that learned some of it, themselves or by an ancestor; `current`: whether the
    one that serves did. `files`: where the rows came from, and how many; they are the user's, and stay. `unknown`:
    as in `Found`. `exports`: files that were written anew without them; `kept_exports`: such as may have them still,
    and why. `damaged`: versions that could not be read, and stay as they are. `unfinished`: whether old pages of the
    catalog have the texts still, for somebody reads them (`READERS`).
    """

    rows: int
    versions: list[str]
    current: bool
    files: dict[str, int]
    unknown: int
    exports: list[str]
    kept_exports: dict[str, str]
    damaged: list[str]
    unfinished: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def find(ws: Workspace, ids: Collection[str] | None = None, where: Sequence[str] = ()) -> Found:
    """The rows with these ids, of all if `ids` is None, for which all conditions hold (`data/where.py`).

    With them come all that say the same. Whole ids are wanted. Raises `UsageError` where an id is unknown, or neither
    ids nor conditions are given.
    """
    if ids is None and not where:
        raise UsageError("say which rows: --ids FILE, --where CONDITION, or both")
    picked, wanted = all_of(where), None if ids is None else {id.strip().lower() for id in ids}
    meant, named, lost = set[str](), 0, set(wanted or ())
    for row in _everything(ws):
        if wanted is None and not picked(row):
            continue
        known = known_by(row)
        lost -= known
        if wanted is None or (not known.isdisjoint(wanted) and picked(row)):
            meant |= known
            named += 1
    for id in lost:
        if not any(id in known for known in _known_to_versions(ws)):
            raise UsageError(f"no row has the id {id!r}; `treering data trace vN --json` has whole ids")
    kept = set() if where else lost  # The catalog has lost them, versions have not.
    found = [row for row in _everything(ws) if not known_by(row).isdisjoint(meant)] if meant else []
    refused = sum("rule" in row for row in found)
    mended, personal = _mended(ws, found)
    return Found(
        frozenset(meant | kept | mended),
        len(found) - refused + len(kept),
        refused,
        len(found) - named,
        sum(not row["messages"] and not row["raw"] and row["rule"] != DELETED for row in found),
        dict(Counter(row["file"] for row in found)),
        personal,
    )


def _mended(ws: Workspace, found: Sequence[Mapping[str, Any]]) -> tuple[set[str], bool]:
    """The marks of these rows as all rules would mend them, for they may come again under other levels of the rules;
    and whether some have personal data, masked or not.
    """
    rows = [Example.of(row["messages"]) for row in found if row["messages"]]
    if not rows:
        return set(), False
    # A rule of the user's own that is not there is no reason to keep rows.
    config = ws.config().model_copy(update={"checks": {}, "languages": ()})
    try:
        mend = opened(config, ws.root).mending(config, ws.root, personal=True)
    except ModelError as error:
        say(f"without the model's tokenizer rows are not known again that a rule mends in another way ({error})")
        return set(), True
    every = [mend(row) for row in rows]
    personal = any("personal-data" in one.mended or any(MASK.search(t.text) for t in one.row.messages) for one in every)
    return {mark for one in every for mark in marks(one.row)}, personal


def forget(ws: Workspace, found: Found) -> Forgotten:
    """Delete what was found. Raises `LockError` while an update runs: it holds the rows in memory."""
    with ws.lock("forget", "update"), full_disk_is_clear(ws.root):
        stones = Tombstones(ws.root)
        write_file(ws.root / DELETING, b"")
        stones.add(found.marks, found.personal)
        return _finish(ws, stones, found, PATIENCE)


def finish(ws: Workspace) -> None:
    """Finish a deletion that a crash cut off, or somebody who read the catalog; says so if somebody does still."""
    with suppress(LockError), ws.lock("forget", "update"), full_disk_is_clear(ws.root):
        note = ws.root / DELETING
        if not note.exists():
            return  # Another command has finished it.
        only_pages = note.read_bytes() == _PAGES
        done = _let_go(ws, 0.0) if only_pages else not _finish(ws, Tombstones(ws.root), Found(), 0.0).unfinished
        if not done:
            say(f"rows were deleted, but {READERS}")


def untaught(ws: Workspace) -> Version | None:
    """The last version of `current`'s line that learned no row that was deleted since, and still has its weights.

    None: only the base model.
    """
    line = registry.lineage(ws, registry.current(ws))
    return next((version for version in line if not registry.unlearned(ws, version) and not version.pruned), None)


def _finish(ws: Workspace, stones: Tombstones, found: Found, patience: float) -> Forgotten:
    """Have everything in the workspace conform to the tombstones; what was `found` is told of."""
    clear(ws)  # What an interrupted update left has rows in it.
    with ws.catalog.writing() as writer:
        rows, gone = erase(writer, stones)
    with ws.catalog.writing() as writer:
        index.clear(writer.index, writer.runs()[0])
    damaged, left = [], Left(ws, stones)
    with ws.changing("forget"):
        for version in registry.versions(ws):
            try:
                redact(version, stones, left)
            except VersionError as error:
                damaged.append(f"{version.name}: {error}")
        registry.forget_rows(ws, stones.__contains__)
    exports, kept = export.without(ws, stones)
    done = _let_go(ws, patience)
    here = {stones.of(mark) for mark in found.marks | gone}
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
        found.unknown,
        exports,
        kept,
        damaged,
        not done,
    )


def _let_go(ws: Workspace, patience: float) -> bool:
    """Have the catalog's file keep nothing of what it lost, the last of a deletion; whether that could be done."""
    note = ws.root / DELETING
    if ws.catalog.flush(patience):
        note.unlink()
        fsync_folder(ws.root)
        return True
    write_file(note, _PAGES)
    return False


def _everything(ws: Workspace) -> Iterator[Mapping[str, Any]]:
    """Each stored row and each in quarantine, which has a `rule`."""
    yield from ws.catalog.every()
    for row in ws.catalog.quarantined():
        if row["rule"] != HELD:  # Those are among the stored ones.
            yield {**row, "messages": row["messages"] and json.loads(row["messages"])}


def _known_to_versions(ws: Workspace) -> Iterator[set[str]]:
    for version in registry.readable(ws):
        yield {*version.rows, *registry.measured(version)}
