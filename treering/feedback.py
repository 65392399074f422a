"""What users say of answers: kept as it came, reviewed, and only then rows in the inbox.

`feedback.jsonl` is a log. A line is either a feedback or a decision on some: nothing in it is ever changed.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from treering.errors import TreeringError, UsageError
from treering.files import append_line, json_line, timestamp, whole_lines, write_file

if TYPE_CHECKING:
    from treering.workspace import Workspace

FILE = "feedback.jsonl"
TASK = "feedback"
LONGEST_NAME = 255
"""Bytes that file systems take for the name of a folder, which a task's name becomes."""

State = Literal["waiting", "accepted", "rejected"]


class Feedback(BaseModel):
    """One user's word on one answer.

    `correction` is the answer it should have been. Without one, only an answer rated `up` can become a row. A server
    takes a `rating` only with `response_id`, the id of its own response, and then knows the `version` by itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    messages: list[dict[str, Any]] = Field(min_length=1)
    answer: str | None = None
    rating: Literal["up", "down"] | None = None
    correction: str | None = Field(None, min_length=1)
    response_id: str | None = Field(None, max_length=100)
    task: str | None = Field(None, pattern=r"^[\w-][\w.-]{0,99}$")
    version: str | None = None
    comment: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Feedback:
        if self.rating is None and self.correction is None:
            raise ValueError("give a rating (up or down) or a correction")
        json_line(self.model_dump())  # Raises for NaN and half characters, which neither log nor row may hold.
        if self.rating == "up" and self.correction is None and self.answer is None:
            raise ValueError("a rating of up needs the answer that it is for")
        return self

    @property
    def row(self) -> dict[str, Any] | None:
        """The training row it makes, in OpenAI's shape; None if it names no good answer."""
        good = self.correction or (self.answer if self.rating == "up" else None)
        return {"messages": [*self.messages, {"role": "assistant", "content": good}]} if good else None


class Entry(BaseModel):
    """A feedback with its id, its time, whose key it came with, and what was decided on it."""

    id: str
    time: str
    key: str | None
    feedback: Feedback
    state: State = "waiting"


def keep(ws: Workspace, feedback: Feedback, key: str | None) -> Entry:
    """Write it down. Raises `UsageError` for a task that no folder can be named for."""
    size = len((feedback.task or "").encode())
    if size > LONGEST_NAME:
        raise UsageError(f"task: the name has {size} bytes; {LONGEST_NAME} is the most, so take a shorter one")
    entry = Entry(id=secrets.token_hex(6), time=timestamp(), key=key, feedback=feedback)
    with ws.changing("feedback"):
        append_line(ws.root / FILE, entry.model_dump(exclude={"state"}, exclude_none=True) | {"key": key})
    return entry


def read(ws: Workspace) -> list[Entry]:
    """All feedback with what was decided on it, oldest first. Raises `TreeringError` for a damaged file."""
    path = ws.root / FILE
    entries: dict[str, Entry] = {}
    for number, line in whole_lines(path):
        with _damage_told(path, number):
            found = json.loads(line)
            if "decided" in found:
                for id in found["ids"]:
                    entries[id] = entries[id].model_copy(update={"state": found["decided"]})
            else:
                entries[found["id"]] = Entry.model_validate(found)
    return list(entries.values())


@contextmanager
def _damage_told(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise TreeringError(f"{path}, line {number} is damaged ({error}); restore the file from a backup") from None


def waiting(entries: Sequence[Entry], rule: str = "all") -> list[Entry]:
    """Those on which nothing was decided and that make a row, as far as `rule` (`corrections` or `all`) lets them."""
    return [
        entry
        for entry in entries
        if entry.state == "waiting" and entry.feedback.row and (rule == "all" or entry.feedback.correction)
    ]


def accept(ws: Workspace, ids: Sequence[str]) -> list[Path]:
    """Make rows of them: a new file in the inbox of each task, which the next ingest reads like any other.

    Raises `TreeringError` if a task's file cannot be written; the other tasks' are there all the same.
    """
    with ws.changing("feedback accept"):
        chosen = _chosen(ws, ids)
        rowless = [entry.id for entry in chosen if entry.feedback.row is None]
        if rowless:
            raise UsageError(f"no good answer is known for {', '.join(rowless)}; only corrections and `up` make rows")
        return _make_rows(ws, chosen)


class Rule:
    """What the setting `serve.feedback` (`corrections` or `all`) lets through without a review.

    It reads each line of the log once, however often it is asked.
    """

    def __init__(self, ws: Workspace, rule: str) -> None:
        self._ws = ws
        self._rule = rule
        self._waiting: dict[str, Entry] = {}
        self._file = self._offset = self._line = 0

    def accept(self) -> list[Path]:
        """Make rows of what came since the last time. Raises `TreeringError` as `read` and `accept` do."""
        self._look()
        if not self._waiting:
            return []
        with self._ws.changing("feedback accept"):
            self._look()  # Somebody may have decided on it meanwhile.
            return _make_rows(self._ws, list(self._waiting.values()))

    def _look(self) -> None:
        path = self._ws.root / FILE
        if not path.exists():
            return
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._file or about.st_size < self._offset:
                self._start_over(about.st_ino)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # It is being written.
                try:
                    with _damage_told(path, self._line + 1):
                        self._take(json.loads(line))
                except TreeringError:
                    self._start_over(0)  # Who mends the file may change any line of it.
                    raise
                self._offset += len(line)
                self._line += 1

    def _start_over(self, file: int) -> None:
        self._file, self._offset, self._line = file, 0, 0
        self._waiting = {}

    def _take(self, found: dict[str, Any]) -> None:
        if "decided" in found:
            for id in found["ids"]:
                self._waiting.pop(id, None)
        else:
            self._waiting.update((entry.id, entry) for entry in waiting([Entry.model_validate(found)], self._rule))


def reject(ws: Workspace, ids: Sequence[str]) -> None:
    """They become no rows; what was said is kept."""
    with ws.changing("feedback reject"):
        _decide(ws, "rejected", _chosen(ws, ids))


def _make_rows(ws: Workspace, chosen: Sequence[Entry]) -> list[Path]:
    """Write the files and the decision, under the lock."""
    by_task: dict[str, list[Entry]] = {}
    for entry in chosen:
        by_task.setdefault(entry.feedback.task or TASK, []).append(entry)
    files, accepted, failures = [], list[Entry](), list[str]()
    for task, entries in by_task.items():
        # Named for its content: after a crash before the decision is noted, the same file is written again.
        path = ws.inbox / task / f"feedback-{entries[0].id}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, b"".join(json_line(entry.feedback.row) for entry in entries))
        except OSError as error:
            failures.append(f"{len(entries)} for {task!r} ({error.strerror})")
            continue
        files.append(path)
        accepted += entries
    _decide(ws, "accepted", accepted)
    if failures:
        raise TreeringError(
            f"no file in the inbox can be written for {'; '.join(failures)}; mend that and accept them again, "
            "or reject them (`treering feedback list` has their ids)"
        )
    return files


def _chosen(ws: Workspace, ids: Sequence[str]) -> list[Entry]:
    open_ = {entry.id: entry for entry in read(ws) if entry.state == "waiting"}
    unknown = [id for id in ids if id not in open_]
    if unknown:
        raise UsageError(f"no feedback waits under {', '.join(unknown)}; `treering feedback list` shows what does")
    return [open_[id] for id in dict.fromkeys(ids)]


def _decide(ws: Workspace, state: State, entries: Sequence[Entry]) -> None:
    if entries:
        append_line(ws.root / FILE, {"decided": state, "ids": [entry.id for entry in entries], "time": timestamp()})
