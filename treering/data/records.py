"""One file in any known container -> its records one by one, whole files only where the container leaves no choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from treering.data.containers import Found, Source
from treering.data.containers.arrow import read_arrow, read_parquet
from treering.data.containers.objects import read_json
from treering.data.containers.packed import PACKINGS
from treering.data.containers.passages import read_passages
from treering.data.containers.tables import read_table
from treering.data.shapes import known_columns
from treering.data.values import RowError
from treering.progress import say

__all__ = ["CONTAINERS", "DATA_SUFFIXES", "Found", "container_of", "records", "stem"]

_PACKED: dict[str, Callable[[Source], Iterator[Found]]] = {
    "jsonl": partial(read_json, lines=True),
    "json": partial(read_json, lines=False),
    "csv": partial(read_table, delimiter=","),
    "tsv": partial(read_table, delimiter="\t"),
    "txt": read_passages,
}
_READERS = {**_PACKED, "parquet": read_parquet, "arrow": read_arrow}
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
CONTAINERS = tuple(_READERS)
DATA_SUFFIXES = (
    *_ENDINGS,
    *(ending + packed for ending in _ENDINGS if _ENDINGS[ending] in _PACKED for packed in PACKINGS),
)


def records(
    path: Path,
    container: str | None = None,
    columns: Callable[[Sequence[str]], list[str]] = known_columns,
    note: Callable[[str], None] | None = None,
) -> Iterator[Found]:
    """Yield the records of a file; a `RowError` raised on the way concerns the whole file.

    `container`: one of `CONTAINERS`; its name's ending tells, where none is given. `columns` and `note` are those of
    `Source`; without `note` it is said on standard error.
    """
    packing = PACKINGS.get(path.suffix.lower())
    container = container or container_of(path)
    if packing and container not in _PACKED:
        raise RowError("unknown-format", f"packed {container} is not read; unpack the file")
    if path.stat().st_size:
        tell = note or (lambda text: say(f"{path}: {text}"))
        yield from _READERS[container](Source(path, packing, columns, tell))


def container_of(path: Path) -> str:
    """The container that the file's name tells. Raises `RowError`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    ending = suffixes[-1] if suffixes else ""
    inner = (suffixes[-2] if len(suffixes) > 1 else "") if ending in PACKINGS else ending
    if inner not in _ENDINGS:
        whole = inner + ending if ending in PACKINGS else ending
        known = ", ".join(DATA_SUFFIXES)
        raise RowError("unknown-format", f"a name ending in {whole!r} is not known; convert the file to one of {known}")
    return _ENDINGS[inner]


def stem(path: Path) -> str:
    """The file's name without what tells its container."""
    inner = Path(path.stem) if path.suffix.lower() in PACKINGS else path
    return inner.stem
