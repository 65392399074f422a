"""Files that are called otherwise than they were, and are the same: the workspace was moved, or a file renamed.

What a file says again is nothing new, so the catalog has to know it again.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from treering.data.read import CORRECTED
from treering.data.schema import duplicates, files, meta, quarantine, rows
from treering.files import printable

_NAMES = (rows.c.file, quarantine.c.file, duplicates.c.file)


def follow(db: sa.Connection, root: Path) -> None:
    """Have what lies in the workspace called by the place where that lies now; the first time, note the place."""
    here, before = printable(str(root)), db.execute(sa.select(meta.c.root)).scalar_one()
    if before == here:
        return
    if before is not None:
        old, new = f"{before}/", f"{here}/"
        db.execute(files.delete().where(files.c.path.startswith(new, autoescape=True)))
        for name in (files.c.path, *_NAMES):
            moved = sa.literal(new) + sa.func.substr(name, len(old) + 1)
            of = sa.update(name.table).where(name.startswith(old, autoescape=True))
            db.execute(of.values({name.key: moved}))
    db.execute(meta.update().values(root=here))


def called(db: sa.Connection, name: str, root: Path) -> str:
    """What a file that is called `name` now was called when the catalog was last written."""
    here, before = f"{printable(str(root))}/", db.execute(sa.select(meta.c.root)).scalar_one()
    return f"{before}/{name.removeprefix(here)}" if before is not None and name.startswith(here) else name


def renamed(db: sa.Connection, name: str, sha256: str) -> None:
    """Know a file again that is called `name` now, by its content, where the one that had it is gone.

    One that was written after that had been ingested is another: it says once more what it says.
    """
    known = db.execute(sa.select(files.c.path).where(files.c.sha256 == sha256)).scalars().all()
    if not known or db.execute(sa.select(files.c.path).where(files.c.path == name)).scalar() is not None:
        return
    for old in known:
        if not os.path.exists(old) and _is_older(name, db.execute(_last_added(old)).scalar()):
            for column in (files.c.path, *_NAMES):
                for what in ("", CORRECTED):  # Rows of it that were corrected since.
                    db.execute(sa.update(column.table).where(column == old + what).values({column.key: name + what}))
            return


def _last_added(file: str) -> sa.Select[Any]:
    each = [sa.select(t.c.added).where(t.c.file == file) for t in (rows, quarantine, duplicates)]
    return sa.select(sa.func.max(sa.union_all(*each).subquery().c.added))


def _is_older(file: str, than: str | None) -> bool:
    """Whether it was last written before the time that `than` tells."""
    try:
        return than is not None and os.stat(file).st_mtime < datetime.fromisoformat(than).timestamp()
    except OSError:
        return False
