"""The catalog: every accepted row stored once, every refused one with its reason."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from treering.data import moved, schema
from treering.data.example import Example
from treering.data.schema import duplicates as _duplicates
from treering.data.schema import files as _files
from treering.data.schema import quarantine as _quarantine
from treering.data.schema import rows as _rows
from treering.data.writer import CHUNK, SUPERSEDED, Writer
from treering.errors import LockError, TreeringError, full_disk_is_clear
from treering.files import printable, sha256

DAMAGED = "put a backup of it back; the versions do not need it to answer"

INDEX = "near"
"""The folder of the index of near duplicates, beside the catalog; it can be made again from the rows."""

_PATIENCE = 60
"""Seconds that a transaction waits for another."""


@dataclass(frozen=True)
class Origin:
    """Where a stored row came from, and when."""

    file: str
    added: datetime


class Catalog:
    """The rows and the quarantine of a workspace, in SQLite (WAL)."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        """`root`: the workspace; None for a copy that lies elsewhere."""
        self.engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), connect_args={"timeout": _PATIENCE})
        sa.event.listen(self.engine, "connect", _durable)
        sa.event.listen(self.engine, "handle_error", _damage_is_clear)
        try:
            with full_disk_is_clear(path.parent), self.engine.connect() as db:
                schema.prepare(db, path)
        except sa.exc.DatabaseError as error:
            raise TreeringError(f"{path} is no usable catalog: {error.orig}") from None
        self.index, self.root = path.parent / INDEX, root

    def copy(self, path: Path) -> Catalog:
        """The same rows in a catalog of their own at `path`, to try things on."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.execute(sa.text("VACUUM INTO :path"), {"path": str(path)})
        if self.index.is_dir():  # Where a run has just been replaced the copy makes its index anew.
            with suppress(OSError):
                shutil.copytree(self.index, path.parent / INDEX, copy_function=_linked)
        return Catalog(path)

    def check(self) -> None:
        """Raises `TreeringError` if the file is damaged, in words that say where."""
        with self.engine.connect() as db:
            found = db.execute(sa.text("PRAGMA quick_check(1)")).scalar_one()
        if found != "ok":
            raise TreeringError(f"treering.db is damaged ({found}); {DAMAGED}")

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """One transaction: all that happens inside is stored, or nothing.

        Raises `LockError` when another process keeps the catalog for longer than a minute.
        """
        with self.engine.begin() as db:
            try:
                # Take the write lock before reading, so that what was read cannot change before it is written.
                db.execute(sa.text("BEGIN IMMEDIATE"))
            except sa.exc.OperationalError as error:
                if "locked" not in str(error.orig):
                    raise
                raise LockError("another process is ingesting into this workspace; try again when it is done") from None
            if self.root is not None:
                moved.follow(db, self.root)
            yield Writer(db, self.index)

    def waiting(self, consumed: Collection[str], file: str | None = None) -> dict[str, list[str]]:
        """Ids of the training rows (of `file`) not in `consumed`, by task, tasks and rows in the order they came."""
        query = sa.select(_rows.c.id, _rows.c.task).where(_rows.c.split == "train").order_by(_rows.c.seq)
        if file is not None:
            query = query.where(_rows.c.file == file)
        found: dict[str, list[str]] = {}
        with self.engine.connect() as db:
            for id, task in db.execute(query):
                if id not in consumed:
                    found.setdefault(task, []).append(id)
        return found

    def train_ids(self, task: str) -> list[str]:
        """Ids of the task's training rows."""
        query = sa.select(_rows.c.id).where(_rows.c.task == task, _rows.c.split == "train").order_by(_rows.c.seq)
        with self.engine.connect() as db:
            return list(db.execute(query).scalars())

    def held_out(self, file: str | None = None) -> dict[str, list[str]]:
        """Ids of the held-out rows by task, in the order they came; of `file`: its own and those that the user gave."""
        query = sa.select(_rows.c.id, _rows.c.task).where(_rows.c.split == "held_out").order_by(_rows.c.seq)
        if file is not None:
            query = query.where(sa.or_(_rows.c.file == file, _rows.c.given))
        found: dict[str, list[str]] = {}
        with self.engine.connect() as db:
            for id, task in db.execute(query):
                found.setdefault(task, []).append(id)
        return found

    def superseded(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids whose rows are no longer true."""
        found: set[str] = set()
        with self.engine.connect() as db:
            for start in range(0, len(ids), CHUNK):
                here = sa.and_(_rows.c.id.in_(ids[start : start + CHUNK]), _rows.c.split.startswith(SUPERSEDED))
                found.update(db.execute(sa.select(_rows.c.id).where(here)).scalars())
        return found

    def rivals(self) -> list[tuple[str, str]]:
        """Training rows, each with a row that was true in between: the same question, and another answer."""
        found = []
        with self.engine.connect() as db:
            query = sa.select(_rows.c.asked, _rows.c.id).where(_rows.c.split.startswith(SUPERSEDED))
            untrue = db.execute(query).all()
            true = sa.select(_rows.c.asked, _rows.c.id).where(_rows.c.split == "train")
            for start in range(0, len(untrue), CHUNK):
                rivals: dict[int, list[str]] = {}
                for asked, id in untrue[start : start + CHUNK]:
                    rivals.setdefault(asked, []).append(id)
                for asked, id in db.execute(true.where(_rows.c.asked.in_(list(rivals)))):
                    found += [(id, rival) for rival in rivals[asked]]
        return found

    def origins(self, ids: Sequence[str]) -> dict[str, Origin]:
        """File and time of arrival of these rows, in the order they came."""
        found: list[tuple[int, str, Origin]] = []
        with self.engine.connect() as db:
            for start in range(0, len(ids), CHUNK):
                query = sa.select(_rows.c.seq, _rows.c.id, _rows.c.file, _rows.c.added)
                for seq, id, file, added in db.execute(query.where(_rows.c.id.in_(ids[start : start + CHUNK]))):
                    found.append((seq, id, Origin(file, datetime.fromisoformat(added))))
        return {id: origin for _, id, origin in sorted(found, key=lambda entry: entry[0])}

    def examples(self, ids: Sequence[str]) -> dict[str, Example]:
        """The examples with these ids. Raises `TreeringError` if one is not stored."""
        found: dict[str, Example] = {}
        with self.engine.connect() as db:
            for start in range(0, len(ids), CHUNK):
                query = sa.select(_rows.c.id, _rows.c.messages).where(_rows.c.id.in_(ids[start : start + CHUNK]))
                found |= {id: Example.of(json.loads(messages)) for id, messages in db.execute(query)}
        missing = [id for id in ids if id not in found]
        if missing:
            raise TreeringError(
                f"the catalog lacks {len(missing)} row(s) that a version needs, first {missing[0]}: "
                "restore treering.db, or ingest the file they came from again"
            )
        return found

    def tasks(self) -> dict[str, dict[str, int]]:
        """Rows of each task: `train`, `held_out`, `superseded`, `aside` (held), `left_out` and `quarantined`."""
        found: dict[str, Counter[str]] = {}
        with self.engine.connect() as db:
            query = sa.select(_rows.c.task, _rows.c.split, sa.func.count()).group_by(_rows.c.task, _rows.c.split)
            for task, split, count in db.execute(query.order_by(_rows.c.task)):
                found.setdefault(task, Counter())[split.partition(":")[0]] += count
            for name, table in (("left_out", _duplicates), ("quarantined", _quarantine)):
                query = sa.select(table.c.task, sa.func.count()).group_by(table.c.task).order_by(table.c.task)
                for task, count in db.execute(query):
                    found.setdefault(task, Counter())[name] = count
        return {task: dict(counts) for task, counts in found.items()}

    def rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """All that is stored of these rows, in the order they came; `where` is as `Writer.known` has it."""
        found = []
        with self.engine.connect() as db:
            for start in range(0, len(ids), CHUNK):
                for row in db.execute(sa.select(_rows).where(_rows.c.id.in_(ids[start : start + CHUNK]))).mappings():
                    kept = {key: row[key] for key in ("id", "task", "given", "file", "line", "added")}
                    where = row["split"].partition(":")[0]
                    found.append((row["seq"], {**kept, "where": where, "messages": json.loads(row["messages"])}))
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]

    def every(self) -> Iterator[dict[str, Any]]:
        """All rows, as `rows` has them, in the order they came."""
        seq = 0
        with self.engine.connect() as db:
            while ids := db.execute(
                sa.select(_rows.c.seq, _rows.c.id).where(_rows.c.seq > seq).order_by(_rows.c.seq).limit(CHUNK)
            ).all():
                seq = ids[-1].seq
                yield from self.rows([id for _, id in ids])

    def flush(self, patience: float = 0.0) -> bool:
        """Have the file hold all that was written, and the log beside it nothing.

        Waits so many seconds for whoever reads what was there before; returns whether it could be done.
        """
        with self.engine.connect() as db:
            db.execute(sa.text(f"PRAGMA busy_timeout={round(patience * 1000)}"))
            try:
                busy, *_ = db.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)")).one()
            finally:
                db.execute(sa.text(f"PRAGMA busy_timeout={_PATIENCE * 1000}"))
        return not busy

    def beginning(self, prefix: str) -> list[str]:
        """Ids of rows that begin so, ten at most."""
        query = sa.select(_rows.c.id).where(_rows.c.id >= prefix, _rows.c.id < prefix + "g").limit(10)  # Hex digits.
        with self.engine.connect() as db:
            return list(db.execute(query).scalars())

    def likes(self, id: str) -> list[dict[str, Any]]:
        """Rows that were left out because of the one with this id: where they stood, and when."""
        query = sa.select(_duplicates.c.file, _duplicates.c.line, _duplicates.c.added).where(_duplicates.c.like == id)
        with self.engine.connect() as db:
            return [dict(row) for row in db.execute(query).mappings()]

    def quarantined(self) -> list[dict[str, Any]]:
        """All rows in quarantine, in the order they came."""
        with self.engine.connect() as db:
            return [dict(row) for row in db.execute(sa.select(_quarantine).order_by(_quarantine.c.seq)).mappings()]

    def counts(self) -> dict[str, int]:
        """Rows stored for training, held out, and in quarantine."""
        with self.engine.connect() as db:
            query = sa.select(_rows.c.split, sa.func.count()).group_by(_rows.c.split)
            splits: dict[str, int] = dict(db.execute(query).all())
            refused = db.execute(sa.select(sa.func.count()).select_from(_quarantine)).scalar_one()
        return {
            "train": splits.get("train", 0),
            "held_out": splits.get("held_out", 0),
            "quarantined": refused,
        }

    def took(self, file: Path) -> bool:
        """Whether the file was ingested with the content it has now; False for one that cannot be read."""
        with self.engine.connect() as db:
            name = printable(str(file))
            name = moved.called(db, name, self.root) if self.root is not None else name
            known = db.execute(sa.select(_files.c.sha256).where(_files.c.path == name)).scalar()
        with suppress(OSError):
            return known is not None and known == sha256(file)
        return False


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)  # Runs never change.
    except OSError:
        shutil.copyfile(source, target)


def _damage_is_clear(context: Any) -> None:
    text = str(context.original_exception)
    if "malformed" in text or "not a database" in text:
        raise TreeringError(f"treering.db is damaged ({text}); {DAMAGED}") from None


def _durable(connection: Any, _: Any) -> None:
    # Autocommit at the driver, so that BEGIN IMMEDIATE is SQLAlchemy's to send.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA secure_delete=ON")  # What is deleted on request must not be readable in free pages.
    cursor.execute("PRAGMA cache_size=-65536")  # KiB: the index of ids is met in random order.
    cursor.close()
