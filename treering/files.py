"""Writing to disk so that a crash leaves the old or the new, never a half; and reading what was written so."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

T = TypeVar("T")


def write_file(path: Path, content: bytes) -> None:
    """Write `content` under another name, fsync, rename: readers see all of it or what was there before."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """The same for content that comes in pieces; where the block raises, what was there before stays."""
    partial = partial_of(path)
    # A link somebody left under that name is not followed.
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644), "wb") as file:
        try:
            yield file
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    fsync_folder(path.parent)


def partial_of(path: Path) -> Path:
    """The file that becomes `path` once it is whole; a crash leaves it."""
    return path.with_name(path.name + ".partial")


def write_json(path: Path, value: Any) -> None:
    """`write_file` for JSON: keys in the order given, NaN refused."""
    write_file(path, (json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode())


def json_line(value: Any) -> bytes:
    """`value` as one line of JSON. Raises `ValueError` for what nobody could read again."""
    try:
        return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(error.object[error.start]):04X}"
        raise ValueError(f"there is {half} in it, half of a character (a lone surrogate); delete it") from None
    except RecursionError:
        raise ValueError("it is nested too deeply; make it flatter") from None


def append_line(path: Path, value: Any) -> None:
    """Append one JSON line and fsync. A line that a crash left unfinished is cut off first."""
    line = json_line(value)
    new = not path.exists()
    with os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644), "ab+") as file:
        # Only after a crash is all of it read: logs are long, and lines many.
        if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if new:
        fsync_folder(path.parent)


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that `append_line` wrote, numbered from 1; one that a crash left unfinished is none, as is no file."""
    yield from enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1)


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Watched(Generic[T]):
    """What `read` makes of the file at `path`, which `write_file` writes: read again whenever it has changed."""

    def __init__(self, path: Path, read: Callable[[], T]) -> None:
        self._path = path
        self._read = read
        self._found: tuple[object, T] | None = None

    def now(self) -> T:
        """What is there now. Raises as `read` does, each time until the file is mended."""
        here = stamp(self._path)
        if self._found is None or self._found[0] != here:
            self._found = here, self._read()
        return self._found[1]


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Something else once a file, a link or anything in a folder was changed, however that was done."""
    found = []
    for one in sorted([path, *path.rglob("*")]):
        with suppress(FileNotFoundError):
            about = one.lstat()
            found.append((str(one), about.st_ctime_ns, about.st_ino))
    return tuple(found)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file below `folder`, and their names, durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def followed(path: Path) -> Path:
    """Where links lead; of a loop, or of a name that no file can have, the path as it is."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return path.absolute()


def one_line(text: str) -> str:
    """`printable`, with control characters as escapes too: a name can hold line ends, and what moves the cursor."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", printable(text))


def printable(text: str) -> str:
    """`text` with what UTF-8 or a database cannot hold (of a file's name, say) written as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
