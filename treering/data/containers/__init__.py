"""What a file may be: one module a container, each of which yields the file's records one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from treering.data.values import RowError


class Found(NamedTuple):
    """A record as decoded, its text where the container has one, and the error that makes it unusable, if any."""

    line: int
    value: object
    raw: str | None = None
    error: RowError | None = None


@dataclass(frozen=True)
class Source:
    """A file to take records from.

    `packing`: `gzip`, `zstd` or none. `columns`: gives those of a table's columns that are of use, and raises
    `RowError` where no row could be. `note` is told what a user should know of a file that can be read all the same.
    """

    path: Path
    packing: str | None
    columns: Callable[[Sequence[str]], list[str]]
    note: Callable[[str], None]
