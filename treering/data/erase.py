"""Take rows out of the catalog for good: from its tables, its free pages and the index of near duplicates."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from treering.data.alike import Said
from treering.data.example import Example
from treering.data.index import Index
from treering.data.schema import duplicates as _duplicates
from treering.data.schema import quarantine as _quarantine
from treering.data.schema import rows as _rows
from treering.data.writer import CHUNK, Writer


def erase(writer: Writer, is_gone: Callable[[str], bool], numbers: Collection[int] = ()) -> int:
    """Delete all rows whose ids are gone, wherever they are, and those of quarantine with these numbers.

    Returns how many were deleted.
    """
    db = writer.db
    found = [seq for seq, id in db.execute(sa.select(_rows.c.seq, _rows.c.id)) if is_gone(id)]
    parts = [found[start : start + CHUNK] for start in range(0, len(found), CHUNK)]
    rows = [row for part in parts for row in db.execute(sa.select(_rows).where(_rows.c.seq.in_(part)))]
    for row in rows:
        writer.take_back(row.id)  # What was set aside stands in quarantine, too.
    refused = list(_refused(writer, is_gone, numbers))
    left_out = [
        id for id, like in db.execute(sa.select(_duplicates.c.id, _duplicates.c.like)) if is_gone(id) or is_gone(like)
    ]
    for table, column, values in (
        (_rows, _rows.c.seq, found),
        (_quarantine, _quarantine.c.seq, [entry.seq for entry in refused]),
        (_duplicates, _duplicates.c.id, left_out),
    ):
        for start in range(0, len(values), CHUNK):
            db.execute(table.delete().where(column.in_(values[start : start + CHUNK])))
    _unlearn_words(writer, [(row.task, row.messages) for row in rows])
    _drop_from_index(writer, found)
    return len(rows) + len(refused)


def like(writer: Writer, ids: Collection[str]) -> Iterator[str]:
    """Ids of the rows that were left out because one of these says the same."""
    for id, other in writer.db.execute(sa.select(_duplicates.c.id, _duplicates.c.like)):
        if other in ids:
            yield id


def _refused(writer: Writer, is_gone: Callable[[str], bool], numbers: Collection[int]) -> Iterator[Any]:
    """Rows of quarantine that are gone, as the table has them."""
    for entry in writer.db.execute(sa.select(_quarantine)):
        if entry.seq in numbers or (entry.messages and is_gone(Example.of(json.loads(entry.messages)).id)):
            yield entry


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
