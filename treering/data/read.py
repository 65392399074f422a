"""Any known format -> examples: a file's rows one by one, each an example or the reason why it is none."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from treering.data.descriptions import is_description, is_spare
from treering.data.example import Example
from treering.data.layout import Layout
from treering.data.pairs import is_pair
from treering.data.records import DATA_SUFFIXES, Found, records
from treering.data.shapes import PLAIN, convert, is_plain_text
from treering.data.values import RAW_LENGTH, RowError
from treering.errors import UsageError
from treering.files import followed, printable
from treering.progress import say

__all__ = ["DATA_SUFFIXES", "Bad", "Row", "RowError", "convert", "find_files", "named_in_utf8", "read", "split_of"]

CORRECTED = " (corrected)"
"""Behind the name of a file: of a row that was in it, and was corrected in quarantine."""

_TOLD = 20
_PARTIAL = ("~", ".tmp", ".part", ".crdownload")
_HELD_OUT = re.compile(r"(test|held[-_]?out)([-_.].*)?", re.DOTALL)
_VAL = re.compile(r"(val|valid|validation|dev)([-_.].*)?", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """An example and where it stood: `line` as in `Bad`."""

    file: str
    line: int
    example: Example


@dataclass(frozen=True)
class Bad:
    """Content that gave no example.

    `line` is the line a record starts on, counted from 1 (JSON Lines, CSV, TSV), or the number of the element, counted
    from 1 (JSON, Parquet, Arrow); 0 means the whole file. `raw` is at most `RAW_LENGTH` characters of the offending
    text. In all three texts, what UTF-8 or a database cannot hold is written as a backslash escape.
    """

    file: str
    line: int
    rule: str
    reason: str
    raw: str
    example: Example | None = None


def read(
    path: Path,
    system: str | None = None,
    need_answer: bool = True,
    *,
    pairs: bool = False,
    name: str | None = None,
    layout: Layout | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[Row | Bad]:
    """Yield every record of the file as a `Row` or a `Bad`; no content makes this raise.

    `system`, `need_answer` and `pairs` are those of `convert`. `name`: what the file is called, if not by its path.
    `note` is told what a user should know of a file that can be read; without it, it is said on standard error.
    """
    try:
        there = path.is_file()
    except OSError:
        there = True  # reported as unreadable when it is opened
    if not there:
        raise UsageError(f"{path} is not a file. Name a data file; for a folder, read each file of find_files().")
    file = printable(name or str(path))
    layout = layout or Layout()
    to_example = partial(convert, system=system, need_answer=need_answer, shape=layout.shape, pairs=pairs)
    tell = note or (lambda text: say(f"{file}: {text}"))
    return _rows(path, file, layout, to_example, tell, texts=need_answer)


def find_files(path: Path, note: Callable[[Path, str], None] = lambda _file, _why: None) -> list[Path]:
    """The file itself, or all files below a folder, sorted by name.

    Hidden files, files still being written (by their endings) and what only describes data (`is_description`,
    `is_spare`) are skipped; so are links that leave the folder and what is no file, of which `note` is told.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        missing = "is no file (a pipe, a device)" if os.path.exists(path) else "does not exist"
        raise UsageError(f"{printable(str(path))} {missing}. Name a data file or a folder of data files.")
    folder, found = followed(path), []
    for file in _walk(path):
        if why := _why_not(file, folder):
            note(file, f"it was left out: {why}")
        elif os.path.isfile(file) and not is_description(file) and not is_spare(file):
            found.append(file)
    return sorted(found)


def named_in_utf8(file: Path) -> bool:
    """Whether a text or a database can hold its name; Linux allows any bytes."""
    return printable(str(file)) == str(file)


def split_of(path: Path) -> Literal["train", "held_out", "val"]:
    """The split that a file's name tells, as in Hugging Face data folders (`test-1.jsonl`, `dev.csv`)."""
    stem = path.name.lower() if path.is_dir() else path.stem.lower()
    if _HELD_OUT.fullmatch(stem):
        return "held_out"
    return "val" if _VAL.fullmatch(stem) else "train"


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename} cannot be listed: {error.strerror}. Make the folder readable.") from error

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked = [name for name in folders if os.path.islink(os.path.join(here, name))]
        whole = [name for name in files if not name.startswith(".") and not name.lower().endswith(_PARTIAL)]
        yield from (Path(here, name) for name in (*linked, *whole))


def _why_not(file: Path, folder: Path) -> str | None:
    """Why something that lies below `folder` is not to be read, where its owner may think it is."""
    if not followed(file).is_relative_to(folder):
        return "it is a link that leads out of the folder; put the file itself there, or name where it leads"
    if not os.path.exists(file):
        return "it is a link that leads nowhere, or may not be seen; put the file itself there"
    return (
        None if os.path.isfile(file) or os.path.isdir(file) else "it is a pipe, a socket or a device; put a file there"
    )


def _rows(
    path: Path,
    file: str,
    layout: Layout,
    to_example: Callable[[object], Example],
    note: Callable[[str], None],
    texts: bool,
) -> Iterator[Row | Bad]:
    """`texts`: whether the file may be one of plain texts, which its first row tells."""
    empty = True
    pairs = kept = plain = 0
    unread = dict[str, None]()
    try:
        for found in records(path, layout.container, partial(_header, layout, unread), note):
            if empty and texts and layout.shape is None and _is_text(found, layout):
                to_example = partial(convert, shape=PLAIN)
            empty = False
            row = _row(file, found, layout, to_example)
            if isinstance(row, Row) and isinstance(found.value, Mapping) and len(unread) < _TOLD:
                unread.update(dict.fromkeys(layout.unread(found.value)))
            pairs += isinstance(row, Row) and is_pair(layout.record(found.value))
            kept += isinstance(row, Row) and row.example.rejected is not None
            plain += isinstance(row, Row) and row.example.is_text
            yield row
        if empty:
            raise RowError("empty-file", "the file holds no rows; add some or delete it")
    except RowError as error:
        yield _bad(file, 0, error, error.raw)
    except (OSError, UnicodeError) as error:  # Unicode: the file changed after its encoding was checked
        yield _bad(file, 0, RowError("unreadable", f"{error}; make the file readable and add it again"), "")
    if unread:
        names = ", ".join(repr(name[:80]) for name in [*unread][:_TOLD])
        note(f"these are no part of a row and were not read: {names}; --columns says what else is (docs/data.md)")
    if kept:
        note(f"{kept} preference pairs, both of whose answers are kept (stage: dpo)")
    elif pairs:
        note(f"{pairs} preference pairs: the chosen answers are learned, the rejected ones are not kept")
    if plain:
        note(f"{plain} plain texts: all of each is learned, as in pre-training; no row of the file has a label")


def _header(layout: Layout, unread: dict[str, None], names: Sequence[str]) -> list[str]:
    """`Layout.header`; what it leaves out is `unread`."""
    kept = layout.header(names)
    unread.update(dict.fromkeys(layout.unread(names)))
    return kept


def _is_text(found: Found, layout: Layout) -> bool:
    try:
        return found.error is None and is_plain_text(layout.record(found.value))
    except RowError:
        return False


def _row(file: str, found: Found, layout: Layout, to_example: Callable[[object], Example]) -> Row | Bad:
    try:
        if found.error:
            raise found.error
        return Row(file, found.line, to_example(layout.record(found.value)))
    except RowError as error:
        raw = _as_json(found.value) if found.raw is None else found.raw
        return _bad(file, found.line, error, error.raw or raw)


def _bad(file: str, line: int, error: RowError, raw: str) -> Bad:
    return Bad(file, line, error.rule, printable(error.reason), printable(raw[:RAW_LENGTH])[:RAW_LENGTH])


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError):
        return ""
