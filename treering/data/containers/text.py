"""A text file: in which encoding it is, its lines, none of them longer than memory has room for."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from treering.data.containers import Source
from treering.data.containers.chinese import is_chinese
from treering.data.containers.packed import unpacked
from treering.data.values import RowError

LONGEST_LINE = 1 << 24
"""Characters of a line that are read; no row that can be learned has as many."""

_SAMPLE = 1 << 16  # Characters by which the language is told.


class CutLine(str):
    """A line of which only the first `LONGEST_LINE` characters were read."""

    __slots__ = ()


class Text:
    """The text of a file; all of it is decoded once before anything is taken from it. Raises `RowError`."""

    def __init__(self, source: Source) -> None:
        self._path: Path = source.path
        self._packing = source.packing
        try:
            self._encoding = self._tried()
        except RowError as error:
            if error.rule != "encoding" or not self._is_gb18030():
                raise
            self._encoding = "gb18030"
            source.note("it is not UTF-8 and was read as GB18030 (GBK), the usual encoding of Chinese files")

    def open(self, newline: str | None = None) -> TextIO:
        """The decoded text; `newline` is that of Python's `open`."""
        return io.TextIOWrapper(self._bytes(), self._encoding, newline=newline)

    def lines(self, newline: str | None = None) -> Iterator[str]:
        """The lines with their ends; what is longer than `LONGEST_LINE` is a `CutLine`."""
        with self.open(newline) as file:
            while line := file.readline(LONGEST_LINE):
                if len(line) < LONGEST_LINE or line[-1] in "\r\n":
                    yield line
                else:
                    yield CutLine(line)
                    while len(line) == LONGEST_LINE and line[-1] not in "\r\n":
                        line = file.readline(LONGEST_LINE)

    def first_lines(self) -> tuple[str, str]:
        """The first two lines that are not blank, without the blanks around them; empty where there are none."""
        filled = (line.strip() for line in self.lines() if line.strip())
        return next(filled, ""), next(filled, "")

    def _bytes(self) -> BinaryIO:
        return self._path.open("rb") if self._packing is None else unpacked(self._path, self._packing)

    def _tried(self) -> str:
        """The encoding, where it is one of those that need no guess."""
        with self._bytes() as file:
            chunk = file.read(1 << 20)
            utf16 = chunk[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            decoder = codecs.getincrementaldecoder("utf-16" if utf16 else "utf-8")()
            read = 0
            while chunk:
                _try_decoding(decoder, chunk, read - len(decoder.getstate()[0]), utf16)
                read += len(chunk)
                chunk = file.read(1 << 20)
            _try_decoding(decoder, b"", read - len(decoder.getstate()[0]), utf16)
        return "utf-16" if utf16 else "utf-8-sig"

    def _is_gb18030(self) -> bool:
        decoder = codecs.getincrementaldecoder("gb18030")()
        foreign = ""
        try:
            with self._bytes() as file:
                while chunk := file.read(1 << 20):
                    text = decoder.decode(chunk)
                    if len(foreign) < _SAMPLE:
                        foreign += "".join(char for char in text if char > "\x7f")
                    if "\0" in text:
                        return False
                decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
        return is_chinese(foreign[:_SAMPLE])


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
