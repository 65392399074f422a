"""Files in `.gz` and `.zst`, unpacked while they are read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO, cast

from treering.data.values import RowError

PACKINGS = {".gz": "gzip", ".zst": "zstd"}
"""What the endings of packed files stand for."""

MOST_UNPACKED = 1 << 36
"""Bytes that a packed file may hold: what has no end would be read for ever."""


def unpacked(path: Path, packing: str) -> BinaryIO:
    """The content of a packed file as a stream, of which a small part is in memory at a time."""
    return cast("BinaryIO", io.BufferedReader(_Unpacked(path, packing), 1 << 18))


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path, packing: str) -> None:
        import pyarrow as pa

        self._file = path.open("rb")
        self._packing = packing
        self._stream = pa.CompressedInputStream(pa.PythonFile(self._file, mode="r"), packing)
        self._left = MOST_UNPACKED

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # What BufferedReader passes.
        try:
            content = self._stream.read(len(buffer))
        except Exception as error:  # Damaged files make pyarrow raise nearly anything.
            reason = f"the {self._packing} data cannot be unpacked: {error}; pack the file again"
            raise RowError("unreadable", reason) from error
        self._left -= len(content)
        if self._left < 0:
            limit = f"{MOST_UNPACKED:,} bytes"
            raise RowError("too-large", f"unpacked, the file has more than {limit}; split it into smaller ones")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
