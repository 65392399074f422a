"""Take rows out of the catalog for good: from its tables, its free pages and the index of near duplicates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from treering.data.alike import Said
from treering.data.example import Example
from treering.data.index import Index
from treering.data.schema import duplicates as _duplicates
from treering.data.schema import quarantine as _quarantine
from treering.data.schema import rows as _rows
from treering.data.schema import within as _within
from treering.data.tombstones import Tombstones, marks
from treering.data.writer import CHUNK, HELD, Writer


def erase(writer: Writer, stones: Tombstones) -> tuple[int, set[str]]:
    """Delete all that bears a tombstone, wherever it is, and rows that were left out because one of it says the same.

    Returns how many were deleted, and by what they were known: all of that has tombstones before anything is deleted,
    so that a deletion which is cut off finds the same again.
    """
    db = writer.db
    seqs = [row.seq for row in db.execute(sa.select(_rows)) if _is_gone(known_by(row._mapping), stones)]
    parts = [seqs[start : start + CHUNK] for start in range(0, len(seqs), CHUNK)]
    rows = [row for part in parts for row in db.execute(sa.select(_rows).where(_rows.c.seq.in_(part)))]
    # What was set aside after a hold stands there too, but is among the stored rows.
    others = sa.select(_quarantine).where(_quarantine.c.rule != HELD)
    refused = [row for row in db.execute(others) if _is_gone(known_by(row._mapping), stones)]
    gone = {mark for row in [*rows, *refused] for mark in known_by(row._mapping)}
    left_out = [
        id
        for id, like in db.execute(sa.select(_duplicates.c.id, _duplicates.c.like))
        if like in gone or _is_gone((id, like), stones)
    ]
    gone.update(left_out)
    stones.add(gone)
    for row in rows:
        writer.take_back(row.id)
    for table, column, values in (
        (_rows, _rows.c.seq, seqs),
        (_within, _within.c.row, seqs),
        (_quarantine, _quarantine.c.seq, [entry.seq for entry in refused]),
        (_duplicates, _duplicates.c.id, left_out),
    ):
        for start in range(0, len(values), CHUNK):
            db.execute(table.delete().where(column.in_(values[start : start + CHUNK])))
    _unlearn_words(writer, [(row.task, row.messages) for row in rows])
    _drop_from_index(writer, seqs)
    return len(rows) + len(refused), gone


def known_by(row: Mapping[str, Any] | sa.RowMapping) -> set[str]:
    """The marks of a stored row or of one in quarantine, as the tables have them or with its messages decoded.

    What is no row and has no text is known by where it stood, and when: as long as it stands there.
    """
    if turns := row["messages"]:
        example = Example.of(json.loads(turns) if isinstance(turns, str) else turns)
        return {*marks(example), *([row["id"]] if "id" in row else ())}
    place = [row[key] for key in ("file", "line", "rule", "reason", "added")]
    return {*marks(row["raw"])} or {f"place:{json.dumps(place)}"}


def _is_gone(known: Iterable[str], stones: Tombstones) -> bool:
    return any(mark in stones for mark in known)


def _unlearn_words(writer: Writer, rows: Sequence[tuple[str, str]]) -> None:
    for task in {task for task, _ in rows}:
        common = writer.common(task)
        common.unlearn(Said.of(Example.of(json.loads(messages))).words for of, messages in rows if of == task)
        writer.keep_common(task, common)


def _drop_from_index(writer: Writer, seqs: Sequence[int]) -> None:
    names, upto = writer.runs()
    try:
        index = Index(writer.index, names)
    except (OSError, ValueError):
        return  # The next ingest makes it anew, of the rows that are left.
    index.drop(seqs)
    writer.keep_runs(index.save(), upto)
