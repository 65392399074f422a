"""The tables of the catalog, and the numbered steps that bring those of an older treering up to date."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from treering.data.alike import Common, Said
from treering.data.example import Example
from treering.errors import TreeringError

_tables = sa.MetaData()
meta = sa.Table(
    "meta", _tables, sa.Column("schema", sa.Integer, nullable=False), sa.Column("root", sa.Text, nullable=True)
)
"""The format, and where the workspace lay when the catalog was last written."""

rows = sa.Table(
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
    sa.Column("asked", sa.BigInteger, nullable=False, index=True),
)
"""Every accepted row. `asked` is that of `Said`."""

within = sa.Table(
    "within",
    _tables,
    sa.Column("row", sa.Integer, nullable=False, index=True),
    sa.Column("asked", sa.BigInteger, nullable=False, index=True),
)
"""What else the row of the catalog with that `seq` asks, where it learns answers before its last (`Said.within`)."""

quarantine = sa.Table(
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
    sa.Column("split", sa.Text, nullable=False),
    sa.Column("messages", sa.Text),
    sqlite_autoincrement=True,  # A number that somebody has written down never comes to mean another row.
)
"""What was refused, `raw` for people, and the side it was to be on; `messages` is the whole row, where it is one."""

duplicates = sa.Table(
    "duplicates",
    _tables,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("like", sa.Text, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("file", sa.Text, nullable=False),
    sa.Column("line", sa.Integer, nullable=False),
    sa.Column("added", sa.Text, nullable=False),
)
"""Rows that were left out because a stored one, `like`, says nearly the same: they stay out when they come again."""

files = sa.Table(
    "files",
    _tables,
    sa.Column("path", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False),
)

runs = sa.Table(
    "runs",
    _tables,
    sa.Column("at", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("upto", sa.Integer, nullable=False),
)
"""The runs of the index of near duplicates, in their order; `upto` is the highest `seq` that it knows."""

words = sa.Table(
    "words",
    _tables,
    sa.Column("task", sa.Text, primary_key=True),
    sa.Column("rows", sa.Integer, nullable=False),
    sa.Column("counts", sa.Text, nullable=False),
)
"""How many rows of a task have each of its frequent words, as JSON."""


def _add_what_was_asked(db: sa.Connection) -> None:
    """2: what is asked of each row, so that duplicates and contradictions are found."""
    db.execute(sa.text("ALTER TABLE rows ADD COLUMN asked BIGINT NOT NULL DEFAULT 0"))
    last = 0
    while True:
        query = sa.select(rows.c.seq, rows.c.messages).where(rows.c.seq > last).order_by(rows.c.seq).limit(10_000)
        found = db.execute(query).all()
        if not found:
            break
        values = [{"at": seq, "asked": Said.of(Example.of(json.loads(text))).asked} for seq, text in found]
        db.execute(rows.update().where(rows.c.seq == sa.bindparam("at")), values)
        last = found[-1].seq
    db.execute(sa.text("CREATE INDEX ix_rows_asked ON rows (asked)"))
    db.execute(sa.text("ALTER TABLE quarantine ADD COLUMN split TEXT NOT NULL DEFAULT 'train'"))
    db.execute(sa.text("ALTER TABLE quarantine ADD COLUMN messages TEXT"))
    _tables.create_all(db, [duplicates, runs, words])


def _keep_to_the_rows(db: sa.Connection) -> None:
    """3: numbers of quarantine never come again, its reasons quote nobody, words are counted of stored rows alone."""
    db.execute(sa.text("ALTER TABLE quarantine RENAME TO numbered_anew"))
    db.execute(sa.text("DROP INDEX ix_quarantine_file"))
    quarantine.create(db)
    names = ", ".join(column.name for column in quarantine.columns)
    db.execute(sa.text(f"INSERT INTO quarantine ({names}) SELECT {names} FROM numbered_anew"))
    db.execute(sa.text("DROP TABLE numbered_anew"))
    reason = "another row answers the same with something else; keep the one that is true, or set dedup.contradictions"
    db.execute(quarantine.update().where(quarantine.c.rule == "contradiction").values(reason=reason))
    db.execute(words.delete())
    for task in db.execute(sa.select(rows.c.task).distinct()).scalars().all():
        common = Common()
        query = sa.select(rows.c.messages).where(rows.c.task == task)
        common.learn(Said.of(Example.of(json.loads(text))).words for text in db.execute(query).scalars())
        counts = json.dumps(common.kept(), ensure_ascii=False)
        db.execute(words.insert().values(task=task, rows=common.rows, counts=counts))


def _add_what_is_asked_within(db: sa.Connection) -> None:
    """4: what rows ask before their last turn, so that a held-out row is found in a longer conversation."""
    _tables.create_all(db, [within])
    query = sa.select(rows.c.seq, rows.c.messages)
    for part in db.execute(query.execution_options(yield_per=10_000)).partitions():
        asked = [(seq, one.asked) for seq, text in part for one in Said.within(Example.of(json.loads(text)))]
        if asked:
            db.execute(within.insert(), [{"row": seq, "asked": hash} for seq, hash in asked])
    db.execute(runs.delete())  # The index is made anew, with all that rows say.


def _add_the_place(db: sa.Connection) -> None:
    """5: where the workspace lies, so that its files are known again where it is moved."""
    db.execute(sa.text("ALTER TABLE meta ADD COLUMN root TEXT"))


MIGRATIONS: tuple[Callable[[sa.Connection], None], ...] = (
    _add_what_was_asked,
    _keep_to_the_rows,
    _add_what_is_asked_within,
    _add_the_place,
)
"""The first makes schema 2 of schema 1."""

SCHEMA = 1 + len(MIGRATIONS)


def prepare(db: sa.Connection, path: Path) -> None:
    """Make the tables, or bring them up to date. Raises `TreeringError` where a newer treering made them."""
    if sa.inspect(db).has_table(meta.name) and _schema(db, path) == SCHEMA:
        return
    db.rollback()
    db.execute(sa.text("BEGIN IMMEDIATE"))  # Whoever waited here for another process finds the work done.
    if not sa.inspect(db).has_table(meta.name):
        _tables.create_all(db)
        db.execute(meta.insert().values(schema=SCHEMA))
    for migrate in MIGRATIONS[_schema(db, path) - 1 :]:
        migrate(db)
    db.execute(meta.update().values(schema=SCHEMA))
    db.commit()


def _schema(db: sa.Connection, path: Path) -> int:
    found = int(db.execute(sa.select(meta.c.schema)).scalar_one())
    if found > SCHEMA:
        raise TreeringError(f"{path} has catalog format {found}, newer than {SCHEMA}: update treering")
    return found
