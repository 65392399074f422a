"""Tables as text: CSV and TSV."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator

from treering.data.containers import Found, Source
from treering.data.containers.text import LONGEST_LINE, CutLine, Text
from treering.data.values import RAW_LENGTH, RowError

_DELIMITERS = (",", ";", "\t", "|")
_TOLD = re.compile(r'"?sep=([^\w\s"]?)"?', re.IGNORECASE)
"""A first line by which Excel is told the delimiter; a tab is gone with the blanks around it."""


_AGAIN, _FREE = 20, 10_000
"""How often the lines of a table may be read again, on average, and how many of them in any case."""


class _Lines:
    """The lines of a table; those that an open quote took can be given back, so that it costs one row only.

    Not without end: where each line opens one anew, that would take time by the square of the lines.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self._read = self._given_back = 0
        self.taken: list[str] = []
        self.number = 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._next()
        self.taken.append(line)
        if isinstance(line, CutLine):
            raise csv.Error(f"a line has more than {LONGEST_LINE:,} characters")
        return line

    def start_record(self) -> None:
        self.number += len(self.taken)
        self.taken.clear()

    def _next(self) -> str:
        self._read += 1
        return next(self._lines)

    def give_back_all_but_first(self) -> None:
        self._again.extendleft(reversed(self.taken[1:]))
        self._given_back += len(self.taken) - 1
        if self._given_back > _AGAIN * self._read + _FREE:
            reason = f"from line {self.number} on, line after line opens a quote that never closes; correct the quotes"
            raise RowError("bad-csv", reason, self.taken[0][:RAW_LENGTH])
        del self.taken[1:]


def read_table(source: Source, delimiter: str) -> Iterator[Found]:
    """CSV with that delimiter, with the one that the file itself tells (`sep=;`), or under which the first line names
    known columns.
    """
    text = Text(source)
    lines = _Lines(text.lines(newline=""))
    first, _ = text.first_lines()
    if told := _TOLD.fullmatch(first):
        delimiter = told[1] or "\t"
        while next(lines).strip() != first:
            pass  # Blank lines before it.
    else:
        delimiter = _delimiter(first, delimiter, source)
    rows = _cells(lines, delimiter)
    for _, header, raw_header in rows:
        names = _column_names(header, raw_header, source)
        for number, cells, raw in rows:
            yield _named(number, cells, raw, names)


def _column_names(header: list[str] | RowError, raw: str, source: Source) -> list[str]:
    try:
        if isinstance(header, RowError):
            raise header
        source.columns(header)
    except RowError as error:
        raise RowError(
            error.rule, f"the first line must name the columns, but {error.reason}", raw[:RAW_LENGTH]
        ) from None
    return header


def _delimiter(first: str, usual: str, source: Source) -> str:
    """The delimiter under which the first line names known columns: spreadsheets use what the user's language does."""
    return next((one for one in (usual, *_DELIMITERS) if _names_columns(first, one, source)), usual)


def _names_columns(line: str, delimiter: str, source: Source) -> bool:
    try:
        source.columns(next(csv.reader([line], delimiter=delimiter), []))
    except (RowError, csv.Error):
        return False
    return True


def _cells(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | RowError, str]]:
    """The line each row starts on, its cells, its text; rows with nothing in any cell are like blank lines."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    cells: list[str] | RowError | None = []
    while cells is not None:
        lines.start_record()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            lines.give_back_all_but_first()
            cells = RowError("bad-csv", f"{error}; close every quoted cell, double the quotes inside it, keep it short")
        if isinstance(cells, RowError) or (cells and any(cell.strip() for cell in cells)):
            yield lines.number, cells, "".join(lines.taken)


def _named(number: int, cells: list[str] | RowError, raw: str, names: list[str]) -> Found:
    if isinstance(cells, RowError):
        return Found(number, None, raw, cells)
    if len(cells) != len(names):
        reason = f"the row has {len(cells)} cells and the header {len(names)}; quote the cells that hold a delimiter"
        return Found(number, None, raw, RowError("bad-csv", reason))
    return Found(number, dict(zip(names, cells, strict=True)), raw)
