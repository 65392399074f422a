"""Rows that answer the same with something else, over time: which are said anew, which stay in quarantine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from treering.data.check import Fit
from treering.data.writer import Known, Stored, Writer

if TYPE_CHECKING:
    from treering.sections import DedupConfig

CONTRADICTION = "contradiction"
"""A rule of quarantine."""


class Disputes:
    """Those of one ingest with what came before it. `released`: all its rows are said anew, whatever their file."""

    def __init__(self, writer: Writer, config: DedupConfig, released: bool = False) -> None:
        self.writer, self.config, self.released = writer, config, released
        self._refused: set[tuple[str, str]] = set()
        """Rows that were in quarantine for it, of the files that are read again: file and id."""
        self._unchanged: set[str] = set()
        """Files that are read again, and have what they had."""

    def read_again(self, file: str) -> None:
        """Forget what of `file` was refused, for it is judged anew, but note what others contradict."""
        self._refused |= {(file, row.example.id) for row in self.writer.quarantined(CONTRADICTION, file)}
        self.writer.read_again(file)

    def unchanged(self, file: str) -> None:
        """Note that `file` has what it had when it was read before, so that it says nothing anew."""
        self._unchanged.add(file)

    def rival(self, row: Stored, against: Sequence[Stored]) -> Stored | None:
        """Who keeps `row` in quarantine, if it was there when its file was read again; `against` are stored rows.

        That a file has grown says nothing of who is right.
        """
        policy = self.config.policy(row.task)
        if (row.file, row.example.id) not in self._refused or policy == "keep-both":
            return None
        there = () if policy == "supersede" else self._there.get(row.said.asked, ())
        rivals = [other for other in there if row.said.contradicts(other.said, self.config.threshold)]
        return next(iter([*rivals, *against]), None)

    def said_anew(self, fits: Sequence[Fit], known: Mapping[str, Known]) -> dict[int, Stored]:
        """Places of rows that are no longer true, and are said once more; with each, what is stored of it.

        So is one that comes from another file, or stands where its file, or further up, said something else in the
        meantime. A file that is merely read again says nothing new.
        """
        ids = [fit.row.example.id for fit in fits]
        was = {row.example.id: row for row in self.writer.superseded([i for i in ids if known.get(i) == "superseded"])}
        asking = by_question(self.writer.asking(row.said.asked for row in was.values()) if was else ())
        lines = {id: fit.row.line for id, fit in zip(ids, fits, strict=True)}
        return {
            place: was[id]
            for place, (id, fit) in enumerate(zip(ids, fits, strict=True))
            if id in was and (self.released or self._is_anew(fit, was[id], asking.get(fit.said.asked, ()), lines))
        }

    def _is_anew(self, fit: Fit, was: Stored, asking: Iterable[Stored], lines: Mapping[str, int]) -> bool:
        """`lines`: where the rows that come with this one stand in their file."""
        row = fit.row
        if row.file in self._unchanged:
            return False
        rivals = [other for other in asking if fit.said.contradicts(other.said, self.config.threshold)]
        if any(lines.get(other.example.id, 0) > row.line for other in rivals):
            return False  # It says something else further down.
        if row.file != was.file:
            return True
        if any(other.file != row.file or lines.get(other.example.id, other.line) > row.line for other in rivals):
            return False
        # A file that has both as it had them before has not changed its mind: somebody has released the first.
        return not any(other.example.id in lines and other.line < was.line for other in rivals)

    @cached_property
    def _there(self) -> dict[int, list[Stored]]:
        """What is left in quarantine for it, once all files that are read again have let go."""
        return by_question(self.writer.quarantined(CONTRADICTION))


def by_question(rows: Iterable[Stored]) -> dict[int, list[Stored]]:
    """The rows by what they ask (`Said.asked`)."""
    found: dict[int, list[Stored]] = {}
    for row in rows:
        found.setdefault(row.said.asked, []).append(row)
    return found
