"""What one transaction of the catalog can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from treering.data.alike import Common, Said
from treering.data.example import Example
from treering.data.moved import renamed
from treering.data.read import Bad, Row
from treering.data.schema import duplicates as _duplicates
from treering.data.schema import files as _files
from treering.data.schema import quarantine as _quarantine
from treering.data.schema import rows as _rows
from treering.data.schema import runs as _runs
from treering.data.schema import within as _within
from treering.data.schema import words as _words
from treering.data.values import RAW_LENGTH
from treering.files import timestamp

Split = Literal["train", "held_out"]
Known = Literal["train", "held_out", "aside", "superseded", "like"]

HELD = "held-by-gate"
"""The rule under which rows of a held update are in quarantine."""

ASIDE, SUPERSEDED = "aside:", "superseded:"
"""Before the split of rows that were accepted once, and are in quarantine or no longer true: versions that learned them
still find their text."""

CHUNK = 5000
"""Values that are bound at once; SQLite takes 32,766."""

_PAGE = 10_000


@dataclass(frozen=True)
class Stored:
    """A row of the catalog, the `seq`th to come.

    `given`: its split was set by the user's own held-out file, not by hash.
    """

    seq: int
    example: Example
    said: Said
    task: str
    split: Split
    given: bool
    file: str
    line: int

    @cached_property
    def within(self) -> list[Said]:
        """As `Said.within`; many rows may be compared with this one."""
        return Said.within(self.example)


class Writer:
    """What can be done inside one transaction of the catalog, whose index lies in the folder `index`."""

    def __init__(self, db: sa.Connection, index: Path) -> None:
        self.db, self.index = db, index
        self.added = timestamp()

    def known(self, ids: Sequence[str]) -> dict[str, Known]:
        """Which of these ids are stored, and on which side.

        `aside`: in quarantine since a version was held; `superseded`: no longer true; `like`: left out, for another row
        that is stored says the same.
        """
        found: dict[str, Any] = {}
        for part in _parts(ids):
            left_out = sa.select(_duplicates.c.id).join(_rows, _rows.c.id == _duplicates.c.like)
            found |= dict.fromkeys(self.db.execute(left_out.where(_duplicates.c.id.in_(part))).scalars(), "like")
            found |= dict(self.db.execute(sa.select(_rows.c.id, _rows.c.split).where(_rows.c.id.in_(part))).all())
        return {id: split.partition(":")[0] for id, split in found.items()}

    def last(self) -> int:
        """The highest number of a row; 0: there is none."""
        return self.db.execute(sa.select(sa.func.max(_rows.c.seq))).scalar() or 0

    def asking(self, asked: Iterable[int]) -> list[Stored]:
        """The rows that are trained or held out and ask this (`Said.asked`), in the order they came."""
        return [row for part in _parts(sorted(set(asked))) for row in self._stored(_rows.c.asked.in_(part))]

    def asking_within(self, asked: Iterable[int]) -> list[Stored]:
        """The rows that are trained or held out and ask this before their last turn, in the order they came."""
        these = sa.select(_within.c.row)
        parts = _parts(sorted(set(asked)))
        return [row for part in parts for row in self._stored(_rows.c.seq.in_(these.where(_within.c.asked.in_(part))))]

    def number(self, id: str) -> int:
        """That of a stored row."""
        found: int = self.db.execute(sa.select(_rows.c.seq).where(_rows.c.id == id)).scalar_one()
        return found

    def numbered(self, seqs: Iterable[int]) -> list[Stored]:
        """Those of the rows with these numbers that are trained or held out, in the order they came."""
        return [row for part in _parts(sorted(set(seqs))) for row in self._stored(_rows.c.seq.in_(part))]

    def newest(self, task: str, most: int) -> list[tuple[int, Example]]:
        """The numbers and the content of the newest training rows of a task."""
        query = sa.select(_rows.c.seq, _rows.c.messages).where(_rows.c.task == task, _rows.c.split == "train")
        found = self.db.execute(query.order_by(_rows.c.seq.desc()).limit(most))
        return [(seq, Example.of(json.loads(messages))) for seq, messages in found]

    def after(self, seq: int) -> Iterator[list[Stored]]:
        """All rows with higher numbers that are trained or held out, page by page."""
        while found := self._stored(_rows.c.seq > seq, _PAGE):
            yield found
            seq = found[-1].seq

    def superseded(self, ids: Sequence[str]) -> list[Stored]:
        """Those of these rows that are no longer true, each on the side it was on."""
        return [row for part in _parts(ids) for row in self._stored(_rows.c.id.in_(part), before=SUPERSEDED)]

    def aside(self, ids: Sequence[str]) -> list[Stored]:
        """Those of these rows that were set aside, each on the side it was on."""
        return [row for part in _parts(ids) for row in self._stored(_rows.c.id.in_(part), before=ASIDE)]

    def _stored(self, which: sa.ColumnElement[bool], most: int | None = None, before: str = "") -> list[Stored]:
        """`before`: what stands before the split."""
        sides = (f"{before}train", f"{before}held_out")
        query = sa.select(_rows).where(which, _rows.c.split.in_(sides)).order_by(_rows.c.seq)
        found = []
        for row in self.db.execute(query.limit(most)):
            example = Example.of(json.loads(row.messages))
            split: Any = row.split.removeprefix(before)
            found.append(Stored(row.seq, example, Said.of(example), row.task, split, row.given, row.file, row.line))
        return found

    def quarantined(self, rule: str, file: str | None = None) -> list[Stored]:
        """The rows (of `file`) that this rule sent to quarantine, by their numbers there."""
        which = [_quarantine.c.rule == rule, _quarantine.c.messages.is_not(None)]
        which += [] if file is None else [_quarantine.c.file == file]
        found = []
        for row in self.db.execute(sa.select(_quarantine).where(*which).order_by(_quarantine.c.seq)):
            example = Example.of(json.loads(row.messages))
            found.append(Stored(row.seq, example, Said.of(example), row.task, row.split, False, row.file, row.line))
        return found

    def sizes(self, task: str) -> tuple[int, int]:
        """How many rows the task has, and how many of them are held out."""
        query = sa.select(_rows.c.split, sa.func.count()).where(_rows.c.task == task).group_by(_rows.c.split)
        counts: dict[str, int] = dict(self.db.execute(query).all())
        return counts.get("train", 0) + counts.get("held_out", 0), counts.get("held_out", 0)

    def has_given_held_out(self, task: str) -> bool:
        """Whether the user gave this task held-out rows of its own."""
        query = sa.select(_rows.c.id).where(_rows.c.task == task, _rows.c.split == "held_out", _rows.c.given).limit(1)
        return self.db.execute(query).first() is not None

    def trained_since(self, seq: int) -> dict[str, list[str]]:
        """Ids of the training rows with higher numbers by task, in the order they came."""
        query = sa.select(_rows.c.id, _rows.c.task).where(_rows.c.seq > seq, _rows.c.split == "train")
        found: dict[str, list[str]] = {}
        for id, task in self.db.execute(query.order_by(_rows.c.seq)):
            found.setdefault(task, []).append(id)
        return found

    def add(self, rows: Sequence[Stored]) -> None:
        """Store rows whose ids are not stored yet."""
        values = [
            {
                "seq": row.seq,
                "id": row.example.id,
                "task": row.task,
                "split": row.split,
                "given": row.given,
                "messages": row.example.as_json(),
                "file": row.file,
                "line": row.line,
                "added": self.added,
                "asked": row.said.asked,
            }
            for row in rows
        ]
        if values:
            self._judge_anew([row.example.id for row in rows])
            self.db.execute(_rows.insert(), values)
        within = [{"row": row.seq, "asked": said.asked} for row in rows for said in row.within]
        if within:
            self.db.execute(_within.insert(), within)

    def leave_out(self, task: str, rows: Sequence[tuple[Row, str]]) -> None:
        """Note rows that are not stored, for another says the same; its id stands beside each."""
        values = [
            {"id": row.example.id, "like": like, "task": task, "file": row.file, "line": row.line, "added": self.added}
            for row, like in rows
        ]
        if values:
            self._judge_anew([row.example.id for row, _ in rows])
            self.db.execute(_duplicates.insert(), values)

    def _judge_anew(self, ids: Sequence[str]) -> None:
        """Forget that these rows were left out."""
        for part in _parts(ids):
            self.db.execute(_duplicates.delete().where(_duplicates.c.id.in_(part)))

    def to_held_out(self, ids: Sequence[str]) -> None:
        """Hold out stored training rows."""
        for part in _parts(ids):
            self.db.execute(_rows.update().where(_rows.c.id.in_(part)).values(split="held_out"))

    def hold_out(self, id: str, task: str) -> str:
        """Move a stored training row to the held-out side of `task`, as the user wants it; returns its task before."""
        self.take_back(id)
        before: str = self.db.execute(sa.select(_rows.c.task).where(_rows.c.id == id)).scalar_one()
        self.db.execute(_rows.update().where(_rows.c.id == id).values(split="held_out", given=True, task=task))
        return before

    def supersede(self, ids: Sequence[str]) -> None:
        """Rows that are no longer true: neither trained nor held out from now on."""
        for part in _parts(ids):
            here = sa.and_(_rows.c.id.in_(part), _rows.c.split.in_(("train", "held_out")))
            self.db.execute(_rows.update().where(here).values(split=SUPERSEDED + _rows.c.split))

    def set_aside(self, ids: Sequence[str], reason: str) -> int:
        """Move stored rows to quarantine, all but those the user gave to judge by; returns how many."""
        moved = 0
        for part in _parts(ids):
            here = sa.and_(_rows.c.id.in_(part), sa.not_(_rows.c.given), _rows.c.split.in_(("train", "held_out")))
            query = sa.select(_rows.c.task, _rows.c.file, _rows.c.line, _rows.c.messages, _rows.c.split).where(here)
            for row in self.db.execute(query.order_by(_rows.c.seq)).all():
                raw, content = row.messages[:RAW_LENGTH], Example.of(json.loads(row.messages))
                self.refuse(row.task, [Bad(row.file, row.line, HELD, reason, raw, content)], row.split)
                moved += 1
            self.db.execute(_rows.update().where(here).values(split=ASIDE + _rows.c.split))
        return moved

    def take_back(self, id: str) -> str | None:
        """Undo `set_aside` for a row; returns the side it is on again, None if it was not set aside."""
        row = self.db.execute(sa.select(_rows).where(_rows.c.id == id, _rows.c.split.startswith(ASIDE))).first()
        if row is None:
            return None
        split: str = row.split.removeprefix(ASIDE)
        self.db.execute(_rows.update().where(_rows.c.id == id).values(split=split))
        self._drop_held(row.file, row.line, row.messages)
        return split

    def settle(self, row: Stored) -> None:
        """Ask nobody any more what becomes of a row that was set aside; it stays so."""
        self._drop_held(row.file, row.line, row.example.as_json())

    def _drop_held(self, file: str, line: int, messages: str) -> None:
        same = (_quarantine.c.rule == HELD, _quarantine.c.file == file, _quarantine.c.line == line)
        # Those of an older treering have no messages, but what they begin with.
        begins = sa.and_(_quarantine.c.messages.is_(None), _quarantine.c.raw == messages[:RAW_LENGTH])
        self.db.execute(_quarantine.delete().where(*same, sa.or_(_quarantine.c.messages == messages, begins)))

    def delete(self, row: Stored) -> None:
        """Store a row no longer."""
        self.db.execute(_rows.delete().where(_rows.c.seq == row.seq))
        self.db.execute(_within.delete().where(_within.c.row == row.seq))

    def refuse(self, task: str, bad: Sequence[Bad], split: Split = "train") -> None:
        """Put what cannot be accepted into quarantine, with the side it was to be on."""
        values = [
            {
                "task": task,
                "file": b.file,
                "line": b.line,
                "rule": b.rule,
                "reason": b.reason,
                "raw": b.raw,
                "added": self.added,
                "split": split,
                "messages": b.example.as_json() if b.example else None,
            }
            for b in bad
        ]
        if values:
            self.db.execute(_quarantine.insert(), values)

    def drop_refused(self, number: int) -> None:
        """Take the row with that number out of quarantine; one that was set aside leaves it once it is taken back."""
        self.db.execute(_quarantine.delete().where(_quarantine.c.seq == number, _quarantine.c.rule != HELD))

    def read_again(self, file: str) -> None:
        """Forget what of `file` was refused: it is judged anew."""
        self.db.execute(_quarantine.delete().where(_quarantine.c.file == file, _quarantine.c.rule != HELD))

    def know_again(self, path: str, sha256: str) -> bool:
        """Whether the file has what it had when it was ingested; it may have been renamed since."""
        renamed(self.db, path, sha256)
        return self.db.execute(sa.select(_files.c.sha256).where(_files.c.path == path)).scalar() == sha256

    def remember_file(self, path: str, sha256: str) -> None:
        """Note the content with which a file was ingested."""
        self.db.execute(_files.delete().where(_files.c.path == path))
        self.db.execute(_files.insert().values(path=path, sha256=sha256))

    def runs(self) -> tuple[list[str], int]:
        """The runs of the index, and the highest number of a row that they know."""
        found = self.db.execute(sa.select(_runs.c.name, _runs.c.upto).order_by(_runs.c.at)).all()
        return [name for name, _ in found], max((upto for _, upto in found), default=0)

    def keep_runs(self, names: Sequence[str], upto: int) -> None:
        """These are the runs of the index from now on."""
        self.db.execute(_runs.delete())
        if names:
            self.db.execute(_runs.insert(), [{"at": at, "name": name, "upto": upto} for at, name in enumerate(names)])

    def common(self, task: str) -> Common:
        """How frequent words are in the rows of a task."""
        found = self.db.execute(sa.select(_words.c.rows, _words.c.counts).where(_words.c.task == task)).first()
        return Common.of(found.rows, json.loads(found.counts)) if found else Common()

    def keep_common(self, task: str, common: Common) -> None:
        """Keep that for the next rows."""
        self.db.execute(_words.delete().where(_words.c.task == task))
        counts = json.dumps(common.kept(), ensure_ascii=False)
        self.db.execute(_words.insert().values(task=task, rows=common.rows, counts=counts))


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


def _parts(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
