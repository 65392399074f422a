"""Which files of the inbox are new and have stopped growing."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from treering.files import printable
from treering.progress import say

if TYPE_CHECKING:
    from treering.workspace import Workspace

_TICK = 1.0
_Signature = tuple[int, int, int]


class Asked(Protocol):
    """Whether the loop was asked to stop; `threading.Event` and `treering.stop.Stop` are that."""

    def is_set(self) -> bool:
        """True once asked."""


@dataclass(frozen=True)
class Look:
    """`ready`: files to take in now. `growing`: seconds until one that still changes may be ready; None: none does.

    `ignored`: files that cannot be taken in where they lie, each told once, and why.
    """

    ready: list[Path]
    growing: float | None
    ignored: dict[str, str] = field(default_factory=dict)


class Inbox:
    """Remembers what each file looked like and since when; told apart by size, time and number, then by content."""

    def __init__(self, ws: Workspace) -> None:
        self.ws = ws
        self.folder = ws.inbox.resolve()
        self._since: dict[Path, tuple[_Signature, float]] = {}
        self._known: dict[Path, _Signature] = {}
        self._ignored: set[Path] = set()

    def look(self, now: float, settle: float) -> Look:
        """Sort the files by whether they have been the same for `settle` seconds. Raises `UsageError`, `OSError`."""
        from treering.data.read import find_files

        found = find_files(self.folder) if self.folder.is_dir() else []
        wrong = {file: reason for file in found if (reason := self._why_not(file))}
        ignored = {printable(str(file)): reason for file, reason in wrong.items() if file not in self._ignored}
        self._ignored = set(wrong)
        files = [file for file in found if file not in wrong]
        ready, growing = [], []
        for file in files:
            signature = _signature(file)
            if signature is None or self._known.get(file) == signature:
                continue
            before, since = self._since.get(file, (None, now))
            if before != signature:
                since = now
                self._since[file] = signature, now
            left = settle - (now - since)
            if left > 0:
                growing.append(left)
            elif self.ws.catalog.took(file):
                self._known[file] = signature
            else:
                ready.append(file)
        there = set(files)
        for memory in (self._since, self._known):
            for gone in memory.keys() - there:
                del memory[gone]
        return Look(ready, min(growing, default=None), ignored)

    def taken(self, files: list[Path]) -> None:
        """These were ingested as they were, whatever became of their rows."""
        for file in files:
            if file in self._since:
                self._known[file] = self._since[file][0]

    def _why_not(self, file: Path) -> str | None:
        from treering.data.intake import BAD_NAME
        from treering.data.read import named_in_utf8

        if not named_in_utf8(file):
            return BAD_NAME
        return "put it into a folder named for its task: inbox/<task>/" if file.parent == self.folder else None


def wakeups(folder: Path, stop: Asked) -> Iterator[bool]:
    """About once a second until asked to stop: whether something in `folder` was seen to change.

    The loop looks now and then by itself, too: a file system across a network tells nobody of changes made elsewhere.
    """
    from watchfiles import watch

    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # It would tell of every change.
    first = True
    try:
        folder.mkdir(exist_ok=True)
        tick = int(1000 * _TICK)
        for changes in watch(
            folder, watch_filter=None, stop_event=stop, rust_timeout=tick, yield_on_timeout=True, raise_interrupt=False
        ):
            yield bool(changes) or first
            first = False
    except (OSError, RuntimeError) as error:
        say(f"{folder} cannot be watched ({error}); it is looked at every minute")
        while not stop.is_set():
            time.sleep(_TICK)
            yield False


def _signature(file: Path) -> _Signature | None:
    try:
        found = file.stat()
    except OSError:
        return None  # It went away in between.
    return found.st_size, found.st_mtime_ns, found.st_ino
