"""What happened: one line an event in `events.jsonl`, on standard error, and to the hooks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.automate.hooks import Hooks
from treering.errors import TreeringError
from treering.files import append_line, printable, whole_lines
from treering.progress import say

if TYPE_CHECKING:
    from treering.sections import AutomateConfig
    from treering.workspace import Workspace

FILE = "events.jsonl"
NAMES = {
    "automation.started": "the loop began",
    "automation.ended": "the loop ended",
    "automation.stopped": "too many failures in a row (go on: `treering watch --resume`), or an error ended the loop",
    "automation.resumed": "the user resumed it",
    "look.failed": "the settings or the inbox could not be read",
    "file.ignored": "a file cannot be taken in: it lies in no task's folder, or its name is not UTF-8",
    "rows.ingested": "files were taken in",
    "rows.quarantined": "rows went to quarantine, when they were taken in or after a hold",
    "ingest.failed": "taking files in failed",
    "update.started": "an update began, and why",
    "update.postponed": "an update is due but may not start yet",
    "update.interrupted": "an update was stopped at a checkpoint, to be resumed",
    "update.promoted": "the new version is current",
    "update.held": "the gate held the new version",
    "update.failed": "an update failed; when it is tried again",
    "hook.failed": "a hook failed several times; it is not sent to the hooks itself",
}
"""Every event, and what it means."""


class Events:
    """Writes events down first, shows them, then hands them to the hooks, which work in a thread of their own.

    None of that raises: what cannot be told does not stop what is to be done.
    """

    def __init__(self, ws: Workspace, clock: Callable[[], datetime]) -> None:
        self.ws, self.clock = ws, clock
        self.hooks = Hooks(ws.root, lambda reason: self._write("hook.failed", reason=reason))
        self._lock = threading.Lock()

    def add(self, event: str, config: AutomateConfig | None = None, **details: Any) -> None:
        """Note an event; `config` says which hooks get it."""
        entry = self._write(event, **details)
        if config is not None:
            self.hooks.send({**entry, "workspace": str(self.ws.root)}, config)

    def _write(self, event: str, **details: Any) -> dict[str, Any]:
        time = self.clock().astimezone(UTC).isoformat(timespec="milliseconds")
        entry = {"time": time, "event": event, **_plain(details)}
        try:
            with self._lock:
                append_line(self.ws.root / FILE, entry)
        except OSError as error:  # Those who get it by a hook, or read standard error, are told all the same.
            say(f"{self.ws.root / FILE} cannot be written ({error})")
        say(describe(entry))
        return entry


def _plain(details: dict[str, Any]) -> dict[str, Any]:
    """Without what is None; texts as UTF-8 can hold them, whatever library or file name they came from."""
    return {
        key: printable(value) if isinstance(value, str) else value
        for key, value in details.items()
        if value is not None
    }


def history(ws: Workspace) -> list[dict[str, Any]]:
    """Every event of the loop, every promotion and every rollback, newest last. Raises `TreeringError` on damage."""
    entries = [
        {**move, "event": "version.promoted" if move["event"] == "promote" else "version.rolled_back"}
        for move in registry.history(ws)
    ]
    path = ws.root / FILE
    for number, line in whole_lines(path):
        try:
            entry = json.loads(line)
            datetime.fromisoformat(entry["time"]), str(entry["event"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise TreeringError(
                f"{path}, line {number} is damaged; take that line out, nothing but `treering history` reads it"
            ) from None
        entries.append(entry)
    return sorted(entries, key=lambda entry: datetime.fromisoformat(entry["time"]))


def describe(entry: dict[str, Any]) -> str:
    """An event in a line."""
    details = {key: value for key, value in entry.items() if key not in ("time", "event") and value is not None}
    when = datetime.fromisoformat(entry["time"]).astimezone()
    shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in details.items() if value is not False)
    return f"{when:%Y-%m-%d %H:%M:%S} {entry['event']}{': ' if shown else ''}{shown}"
