"""One file in any known container -> its records one by one, whole files only where the container leaves no choice."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from treering.data.shapes import KNOWN_KEYS, RowError, plain, require_columns

if TYPE_CHECKING:
    import pyarrow as pa

_WRAPPERS = ("data", "train", "rows")
_DELIMITERS = (",", ";", "\t")
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
# What is left of a number or an escape where JSON was cut inside it.
_CUT = re.compile(r"\.|[eE][+-]?|\\?u?[0-9a-fA-F]{0,4}")


class Found(NamedTuple):
    """A record as decoded, its text where the container has one, and the error that makes it unusable, if any."""

    line: int
    value: object
    raw: str | None = None
    error: RowError | None = None


@dataclass(frozen=True)
class _Refused:
    """Stands in decoded JSON for what Python would take although no two readers agree on it."""

    reason: str
    value: object

    def __str__(self) -> str:
        return str(self.value)


def records(path: Path) -> Iterator[Found]:
    """Yield the records of a file; a `RowError` raised on the way concerns the whole file."""
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        known = ", ".join(DATA_SUFFIXES)
        raise RowError(
            "unknown-format", f"a name ending in {suffix!r} is not known; convert the file to one of {known}"
        )
    if path.stat().st_size:
        yield from _READERS[suffix](path)


def _encoding(path: Path) -> str:
    """The encoding of a text file, all of which is tried before any row is taken from it."""
    with path.open("rb") as file:
        utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-16" if utf16 else "utf-8")()
        ended = False
        while not ended:
            start = file.tell() - len(decoder.getstate()[0])
            chunk = file.read(1 << 20)
            ended = not chunk
            _try_decoding(decoder, chunk, start, utf16)
    return "utf-16" if utf16 else "utf-8-sig"


def _try_decoding(decoder: codecs.IncrementalDecoder, chunk: bytes, start: int, utf16: bool) -> None:
    wrong = None
    try:
        holds_nul = "\0" in decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        holds_nul = b"\0" in chunk and not utf16
        wrong = _encoding_error(error, start + error.start, "UTF-16, as its first two bytes say," if utf16 else "UTF-8")
    if holds_nul:
        raise RowError("binary-file", "the file holds NUL bytes, so it is not text; export it as UTF-8 text")
    if wrong:
        raise wrong


def _encoding_error(error: UnicodeDecodeError, offset: int, name: str) -> RowError:
    around = error.object[max(0, error.start - 100) : error.start + 100].decode("ascii", "backslashreplace")
    return RowError("encoding", f"the file is not {name} at byte {offset}; convert it to UTF-8", around)


# JSON


def _once_each(pairs: list[tuple[str, object]]) -> object:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
    return _Refused(f"the key {twice[:80]!r} stands twice in one object; keep one of them", pairs)


def _integer(digits: str) -> object:
    try:
        return int(digits)
    except ValueError:
        return _Refused(f"an integer has {len(digits)} digits; write it as text", digits)


def _constant(name: str) -> object:
    return _Refused(f"{name} is not JSON; write null or a text", name)


_DECODER = json.JSONDecoder(object_pairs_hook=_once_each, parse_int=_integer, parse_constant=_constant)


def _json(path: Path, lines: bool) -> Iterator[Found]:
    """JSON Lines where `lines`, else one JSON value; each is recognised under the other's name."""
    encoding = _encoding(path)
    first, second = _first_lines(path, encoding)
    if lines and not first.startswith("["):
        yield from _json_lines(path, encoding)
    elif first:
        try:
            found = _elements(_decode(path.read_text(encoding)))
        except RowError:
            if not (lines or _are_rows(first, second)):
                raise
            found = _json_lines(path, encoding)
        yield from found


def _first_lines(path: Path, encoding: str) -> tuple[str, str]:
    with path.open(encoding=encoding) as file:
        filled = (line.strip() for line in file if line.strip())
        return next(filled, ""), next(filled, "")


def _are_rows(first: str, second: str) -> bool:
    # In one JSON object laid out over lines, no line after the first starts a second object.
    return first.startswith("{") and (second.startswith("{") or (first.endswith("}") and second != ""))


def _json_lines(path: Path, encoding: str) -> Iterator[Found]:
    with path.open(encoding=encoding) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_line(number, line.rstrip())


def _json_line(number: int, line: str) -> Found:
    try:
        value = _decode(line)
    except RowError as error:
        return Found(number, None, line, error)
    return Found(number, value, line, _refusal(value))


def _elements(value: object) -> Iterator[Found]:
    rows = value if isinstance(value, list) else _wrapped(value)
    return (Found(number, row, error=_refusal(row)) for number, row in enumerate(rows, 1))


def _wrapped(value: object) -> list[object]:
    """The rows under an object's `data`, `train` or `rows`; any other value is itself the one row."""
    named = value.items() if isinstance(value, dict) else ()
    tables: dict[str, list[object]] = {key: rows for key, rows in named if _is_table(key, rows)}
    wrappers = [key for key in tables if plain(key) in _WRAPPERS]
    if not wrappers:
        return [value]
    if len(tables) > 1:
        names = " and ".join(repr(key[:80]) for key in tables)
        raise RowError("unknown-format", f"the lists {names} stand in one file; give each a file of its own")
    return tables[wrappers[0]]


def _is_table(key: str, value: object) -> bool:
    return isinstance(value, list) and (plain(key) in _WRAPPERS or any(isinstance(row, dict) for row in value))


def _refusal(value: object) -> RowError | None:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, _Refused):
            return RowError("bad-json", part.reason)
        if isinstance(part, dict | list):
            waiting.extend(part.values() if isinstance(part, dict) else part)
    return None


def _decode(text: str) -> object:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise RowError("bad-json", "the JSON is nested too deep; a row needs a few levels", text[:200]) from None
    except json.JSONDecodeError as error:
        raise _json_error(error) from None


def _json_error(error: json.JSONDecodeError) -> RowError:
    line = f"line {error.lineno} " if "\n" in error.doc else ""
    place = f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"
    around = error.doc[max(0, error.pos - 1000) : error.pos + 1000]
    if error.msg.startswith("Unterminated") or _is_cut(error.doc[error.pos : error.pos + 20].rstrip()):
        return RowError("truncated-json", f"the JSON breaks off ({place}); write it again, whole", around)
    return RowError("bad-json", f"this is not JSON ({place}); correct it there", around)


def _is_cut(rest: str) -> bool:
    return any(word.startswith(rest) for word in _WORDS) or _CUT.fullmatch(rest) is not None


# CSV and TSV


class _Lines:
    """The lines of a table; those that an open quote took can be given back, so that it costs one row only."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self.taken: list[str] = []
        self.number = 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        return line

    def start_record(self) -> None:
        self.number += len(self.taken)
        self.taken.clear()

    def give_back_all_but_first(self) -> None:
        self._again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def _table(path: Path, delimiter: str) -> Iterator[Found]:
    encoding = _encoding(path)
    delimiter = _delimiter(path, encoding, delimiter)
    with path.open(encoding=encoding, newline="") as file:
        rows = _cells(_Lines(file), delimiter)
        for _, header, raw_header in rows:
            names = _column_names(header, raw_header)
            for number, cells, raw in rows:
                yield _named(number, cells, raw, names)


def _column_names(header: list[str] | RowError, raw: str) -> list[str]:
    try:
        if isinstance(header, RowError):
            raise header
        require_columns(header)
    except RowError as error:
        raise RowError(error.rule, f"the first line must name the columns, but {error.reason}", raw) from None
    return header


def _delimiter(path: Path, encoding: str, usual: str) -> str:
    """The delimiter under which the first line names known columns: spreadsheets use what the user's language does."""
    first, _ = _first_lines(path, encoding)
    return next((one for one in (usual, *_DELIMITERS) if _names_columns(first, one)), usual)


def _names_columns(line: str, delimiter: str) -> bool:
    try:
        require_columns(next(csv.reader([line], delimiter=delimiter), []))
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


# Parquet


def _parquet(path: Path) -> Iterator[Found]:
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file, page_checksum_verification=True)
            names = table.schema_arrow.names
            require_columns(names)
            # Other columns may hold images, or dates that Python cannot.
            known = [name for name in names if plain(name) in KNOWN_KEYS]
            for batch in table.iter_batches(batch_size=1024, columns=known):
                for found in _batch(batch, number):
                    number += 1
                    yield found
    except RowError:
        raise
    except Exception as error:  # a damaged file makes pyarrow raise nearly anything
        raise RowError(
            "unreadable", f"the Parquet cannot be read after row {number}: {error}; write the file again"
        ) from error


def _batch(batch: pa.RecordBatch, before: int) -> list[Found]:
    try:
        return [Found(number, row) for number, row in enumerate(batch.to_pylist(), before + 1)]
    except ValueError:  # one row is not what the schema says; find out which
        return [_one(batch.slice(place, 1), before + place + 1) for place in range(batch.num_rows)]


def _one(batch: pa.RecordBatch, number: int) -> Found:
    try:
        return Found(number, batch.to_pylist()[0])
    except ValueError as error:
        return Found(number, None, "", RowError("unreadable", f"the row cannot be decoded: {error}; write it again"))


_READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": partial(_json, lines=True),
    ".ndjson": partial(_json, lines=True),
    ".json": partial(_json, lines=False),
    ".csv": partial(_table, delimiter=","),
    ".tsv": partial(_table, delimiter="\t"),
    ".parquet": _parquet,
}
DATA_SUFFIXES = tuple(_READERS)
