"""Rows that are read, and memory that ran out meanwhile: what is left of them is read in halves of the parts.

It is written down before reading goes on, so that a run that is killed reads in the same parts, to the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treering.errors import LESS_TO_READ, TreeringError
from treering.files import write_json
from treering.progress import say

FILE = "readings.json"

Part = Sequence[int]


@dataclass(frozen=True)
class Halved:
    """Memory ran out in reading `number` of `what`: from `part` (counted from 0) on, at most `rows` go together."""

    what: str
    number: int
    part: int
    rows: int
    reason: str


class Readings:
    """The readings of one update, and what each had to adapt to; kept in `folder` (with None: nowhere)."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / FILE if folder else None
        found = json.loads(self._path.read_text(encoding="utf-8")) if self._path and self._path.exists() else []
        self.halved = [Halved(**halved) for halved in found]

    def of(self, what: str, number: int = 0) -> Reading:
        """Reading `number` of `what` ("measuring the parent"); those of one name follow each other by their numbers."""
        return Reading(self, what, number)

    def note(self, found: Halved) -> None:
        """Write it down, and tell."""
        self.halved.append(found)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, [asdict(halved) for halved in self.halved])
        rows = "one row is" if found.rows == 1 else f"at most {found.rows} rows are"
        say(f"{found.reason}; from there on {rows} read at once, which changes nothing but rounding")

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """What the manifest says of it, as choices with their reasons."""
        return {
            f"rows at once when {halved.what}": {"value": halved.rows, "reason": halved.reason}
            for halved in self.halved
        }


class Reading:
    """One of the `readings`."""

    def __init__(self, readings: Readings, what: str, number: int) -> None:
        self._readings, self._what, self._number = readings, what, number

    def known(self, parts: Sequence[Part]) -> list[Part]:
        """`parts` as earlier readings of the name left them, and as this one did in a run that was killed.

        Not as those of other names did, though memory was short there: a resumed run does not know which of them came
        before this one.
        """
        found = list(parts)
        for halved in self._readings.halved:
            if halved.what == self._what and halved.number <= self._number:
                found = _halves(found, halved.part if halved.number == self._number else 0)
        return found

    def next(self) -> Reading:
        """The one that follows."""
        return Reading(self._readings, self._what, self._number + 1)

    def halve(self, parts: Sequence[Part], part: int, at_once: int, error: str) -> list[Part]:
        """The parts to go on with at `part`, where memory ran out while `at_once` of them were read.

        Raises:
            TreeringError: these are rows alone.
        """
        reason = f"out of memory when {self._what} ({error})"
        if all(len(one) == 1 for one in parts[part : part + at_once]):
            raise TreeringError(f"{reason}, with one row at a time. {LESS_TO_READ}")
        found = _halves(parts, part)
        self._readings.note(Halved(self._what, self._number, part, max(map(len, found[part:])), reason))
        return found


def _halves(parts: Sequence[Part], start: int) -> list[Part]:
    found = list(parts[:start])
    for part in parts[start:]:
        middle = (len(part) + 1) // 2
        found += [half for half in (part[:middle], part[middle:]) if half]
    return found
