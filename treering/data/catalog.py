"""The catalog: every accepted row stored once, every refused one with its reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from treering.data.dedup import Split
from treering.data.example import Example
from treering.data.read import Bad
from treering.errors import LockError, TreeringError, full_disk_is_clear
from treering.files import printable, sha256, timestamp

SCHEMA = 1
DAMAGED = "put a backup of it back; the versions do not need it to answer"
HELD = "held-by-gate"
"""The rule under which rows of a held update are in quarantine."""

_ASIDE = "aside:"
"""Before the split of rows in quarantine that were accepted once: versions that learned them still find their text."""

_CHUNK = 500  # SQLite takes a limited number of bound values.
_RAW_LENGTH = 2000

_tables = sa.MetaData()
_meta = sa.Table("meta", _tables, sa.Column("schema", sa.Integer, nullable=False))
_rows = sa.Table(
    "rows",
    _tables,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("task", sa.Text, nullable=False, index=True),
    sa.Column("split", sa.Text, nullable=False),
    sa.Column("given", sa.Boolean, nullable=False),
    sa.Column("messages", sa.Text, nullable=False),
    sa.Column("file", sa.Text, nullable=False),
    sa.Column("line", sa.Integer, nullable=False),
    sa.Column("added", sa.Text, nullable=False),
)
_quarantine = sa.Table(
    "quarantine",
    _tables,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("file", sa.Text, nullable=False, index=True),
    sa.Column("line", sa.Integer, nullable=False),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("raw", sa.Text, nullable=False),
    sa.Column("added", sa.Text, nullable=False),
)
_files = sa.Table(
    "files",
    _tables,
    sa.Column("path", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False),
)


@dataclass(frozen=True)
class Stored:
    """A row of the catalog. `given`: its split was set by the user's own held-out file, not by hash."""

    example: Example
    task: str
    split: Split
    given: bool
    file: str
    line: int


@dataclass(frozen=True)
class Origin:
    """Where a stored row came from, and when."""

    file: str
    added: datetime


class Catalog:
    """The rows and the quarantine of a workspace, in SQLite (WAL)."""

    def __init__(self, path: Path) -> None:
        self.engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), connect_args={"timeout": 60})
        sa.event.listen(self.engine, "connect", _durable)
        sa.event.listen(self.engine, "handle_error", _damage_is_clear)
        try:
            with full_disk_is_clear(path.parent), self.engine.connect() as db:
                if not sa.inspect(db).has_table(_meta.name):
                    _create(db)
                schema = db.execute(sa.select(_meta.c.schema)).scalar_one()
        except sa.exc.DatabaseError as error:
            raise TreeringError(f"{path} is no usable catalog: {error.orig}") from None
        if schema > SCHEMA:
            raise TreeringError(f"{path} has catalog format {schema}, newer than {SCHEMA}: update treering")

    def copy(self, path: Path) -> Catalog:
        """The same rows in a catalog of their own at `path`, to try things on."""
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as db:
            db.execute(sa.text("VACUUM INTO :path"), {"path": str(path)})
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
            yield Writer(db)

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

    def origins(self, ids: Sequence[str]) -> dict[str, Origin]:
        """File and time of arrival of these rows, in the order they came."""
        found: list[tuple[int, str, Origin]] = []
        with self.engine.connect() as db:
            for start in range(0, len(ids), _CHUNK):
                query = sa.select(_rows.c.seq, _rows.c.id, _rows.c.file, _rows.c.added)
                for seq, id, file, added in db.execute(query.where(_rows.c.id.in_(ids[start : start + _CHUNK]))):
                    found.append((seq, id, Origin(file, datetime.fromisoformat(added))))
        return {id: origin for _, id, origin in sorted(found, key=lambda entry: entry[0])}

    def examples(self, ids: Sequence[str]) -> dict[str, Example]:
        """The examples with these ids. Raises `TreeringError` if one is not stored."""
        found: dict[str, Example] = {}
        with self.engine.connect() as db:
            for start in range(0, len(ids), _CHUNK):
                query = sa.select(_rows.c.id, _rows.c.messages).where(_rows.c.id.in_(ids[start : start + _CHUNK]))
                found |= {id: Example.of(json.loads(messages)) for id, messages in db.execute(query)}
        missing = [id for id in ids if id not in found]
        if missing:
            raise TreeringError(
                f"the catalog lacks {len(missing)} row(s) that a version needs, first {missing[0]}: "
                "restore treering.db, or ingest the file they came from again"
            )
        return found

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
            known = db.execute(sa.select(_files.c.sha256).where(_files.c.path == printable(str(file)))).scalar()
        with suppress(OSError):
            return known is not None and known == sha256(file)
        return False


class Writer:
    """What can be done inside one transaction of the catalog."""

    def __init__(self, db: sa.Connection) -> None:
        self.db = db
        self.added = timestamp()

    def splits(self, ids: Sequence[str]) -> dict[str, Split | Literal["aside"]]:
        """Which of these ids are stored, and on which side; `aside`: in quarantine since a version was held."""
        found: dict[str, Any] = {}
        for start in range(0, len(ids), _CHUNK):
            query = sa.select(_rows.c.id, _rows.c.split).where(_rows.c.id.in_(ids[start : start + _CHUNK]))
            found |= dict(self.db.execute(query).all())
        return {id: "aside" if split.startswith(_ASIDE) else split for id, split in found.items()}

    def sizes(self, task: str) -> tuple[int, int]:
        """How many rows the task has, and how many of them are held out."""
        query = sa.select(_rows.c.split, sa.func.count()).where(_rows.c.task == task).group_by(_rows.c.split)
        counts: dict[str, int] = dict(self.db.execute(query).all())
        return counts.get("train", 0) + counts.get("held_out", 0), counts.get("held_out", 0)

    def has_given_held_out(self, task: str) -> bool:
        """Whether the user gave this task held-out rows of its own."""
        query = sa.select(_rows.c.id).where(_rows.c.task == task, _rows.c.split == "held_out", _rows.c.given).limit(1)
        return self.db.execute(query).first() is not None

    def add(self, rows: Iterable[Stored]) -> None:
        """Store rows whose ids are not stored yet."""
        values = [
            {
                "id": row.example.id,
                "task": row.task,
                "split": row.split,
                "given": row.given,
                "messages": json.dumps(row.example.as_dicts(), ensure_ascii=False),
                "file": row.file,
                "line": row.line,
                "added": self.added,
            }
            for row in rows
        ]
        if values:
            self.db.execute(_rows.insert(), values)

    def hold_out(self, id: str, task: str) -> None:
        """Move a stored training row to the held-out side of `task`."""
        self.take_back(id)
        self.db.execute(_rows.update().where(_rows.c.id == id).values(split="held_out", given=True, task=task))

    def set_aside(self, ids: Sequence[str], reason: str) -> int:
        """Move stored rows to quarantine, all but those the user gave to judge by; returns how many."""
        moved = 0
        for start in range(0, len(ids), _CHUNK):
            here = sa.and_(_rows.c.id.in_(ids[start : start + _CHUNK]), sa.not_(_rows.c.given))
            here = sa.and_(here, _rows.c.split.in_(("train", "held_out")))
            query = sa.select(_rows.c.task, _rows.c.file, _rows.c.line, _rows.c.messages).where(here)
            for row in self.db.execute(query.order_by(_rows.c.seq)).all():
                self._refuse(row.task, [Bad(row.file, row.line, HELD, reason, row.messages[:_RAW_LENGTH])])
                moved += 1
            self.db.execute(_rows.update().where(here).values(split=_ASIDE + _rows.c.split))
        return moved

    def take_back(self, id: str) -> str | None:
        """Undo `set_aside` for a row; returns the side it is on again, None if it was not set aside."""
        row = self.db.execute(sa.select(_rows).where(_rows.c.id == id, _rows.c.split.startswith(_ASIDE))).first()
        if row is None:
            return None
        split: str = row.split.removeprefix(_ASIDE)
        self.db.execute(_rows.update().where(_rows.c.id == id).values(split=split))
        same = (_quarantine.c.file == row.file, _quarantine.c.line == row.line)
        raw = _quarantine.c.raw == row.messages[:_RAW_LENGTH]
        self.db.execute(_quarantine.delete().where(_quarantine.c.rule == HELD, *same, raw))
        return split

    def quarantine(self, task: str, file: str | None, bad: Sequence[Bad]) -> None:
        """Replace the rows of `file` that could not be accepted by `bad`; None: add them."""
        self.db.execute(_quarantine.delete().where(_quarantine.c.file == file, _quarantine.c.rule != HELD))
        self._refuse(task, bad)

    def _refuse(self, task: str, bad: Sequence[Bad]) -> None:
        values = [
            {
                "task": task,
                "file": b.file,
                "line": b.line,
                "rule": b.rule,
                "reason": b.reason,
                "raw": b.raw,
                "added": self.added,
            }
            for b in bad
        ]
        if values:
            self.db.execute(_quarantine.insert(), values)

    def remember_file(self, path: str, sha256: str) -> None:
        """Note the content with which a file was ingested."""
        self.db.execute(_files.delete().where(_files.c.path == path))
        self.db.execute(_files.insert().values(path=path, sha256=sha256))


def _create(db: sa.Connection) -> None:
    """Make the tables, all or none; whoever waited for another process that made them finds them made."""
    db.execute(sa.text("BEGIN IMMEDIATE"))
    _tables.create_all(db)
    if db.execute(sa.select(_meta.c.schema)).first() is None:
        db.execute(_meta.insert().values(schema=SCHEMA))
    db.commit()


def choose_held_out(ids: Sequence[str], share: float, stored: int = 0, held_out: int = 0) -> set[str]:
    """Which of the new `ids` of a task to hold out: those with the lowest hashes, random but always the same.

    As many as bring the task to `share`, with the `stored` rows it has already, `held_out` of them on that side; at
    least one once it has five rows.
    """
    rows = stored + len(ids)
    wanted = round(share * rows)
    if share > 0 and rows >= 5:
        wanted = max(1, wanted)
    count = max(0, wanted - held_out)
    return set(sorted(ids, key=lambda id: hashlib.blake2b(f"held-out:{id}".encode(), digest_size=8).digest())[:count])


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
    cursor.close()
