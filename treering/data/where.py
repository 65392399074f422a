"""Conditions that pick rows: `task=coffee`, `text~jane@example.com`, `added<2026-01-31`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from treering.data.example import REJECTED
from treering.data.read import CORRECTED
from treering.data.spelling import plainly, readings
from treering.data.tools import CALLED, OFFERED, compact
from treering.errors import UsageError

_CONDITION = re.compile(r"\s*(?P<field>\w+)\s*(?P<sign>[=~<>])\s*(?P<value>.*?)\s*", re.DOTALL)


def _texts(row: Mapping[str, Any]) -> list[str]:
    """All that it says; of what is no row, the text that quarantine has of it."""
    turns = row["messages"]
    return [text for turn in turns for text in _said(turn)] if turns else [str(row.get("raw", ""))]


def _answers(row: Mapping[str, Any]) -> list[str]:
    """The answer, what it calls, and the one that was rejected for it."""
    return list(_said(row["messages"][-1])) if row["messages"] else []


def _said(turn: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a turn: what it says, and all of its tools and calls, but for the frame that each of them has."""
    yield turn["content"]
    if len(turn) == 2:  # As nearly all are.
        return
    for framed in (*turn.get(OFFERED, ()), *turn.get(CALLED, ())):
        yield from _strings([framed.get("id"), *framed["function"].values()])
    yield from _strings([turn.get(key) for key in ("name", "tool_call_id", REJECTED)])


def _strings(value: Any) -> Iterator[str]:
    """The texts and numbers of a JSON value, names of keys included."""
    if isinstance(value, Mapping):
        value = [part for pair in value.items() for part in pair]
    if isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif value is not None:
        yield value if isinstance(value, str) else compact(value)


_FIELDS: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[str]]]] = {
    "task": ("=~", lambda row: [str(row["task"])]),
    "file": ("=~", lambda row: [str(row["file"]), str(row["file"]).removesuffix(CORRECTED)]),
    "answer": ("=~", _answers),
    "text": ("~", _texts),
    "added": ("<>", lambda row: [str(row["added"])]),
}
"""Which signs each field takes, and what a row has for it: one of these texts is to fit."""


@dataclass(frozen=True)
class Condition:
    """One of them. `=`: the same text; `~`: has it, however it is written; `<` and `>`: before and after a time."""

    field: str
    sign: str
    value: str

    @classmethod
    def of(cls, text: str) -> Condition:
        """Read `FIELD SIGN VALUE`. Raises `UsageError` for any other."""
        found = _CONDITION.fullmatch(text)
        known = ", ".join(field + sign for field, (signs, _) in _FIELDS.items() for sign in signs)
        if found is None or found["sign"] not in _FIELDS.get(found["field"], ("", None))[0]:
            raise UsageError(f"--where {text!r} is no condition; they begin with one of {known}")
        if not found["value"]:
            raise UsageError(f"--where {text!r} has no value, and would pick nothing or all; write one")
        if found["sign"] in "<>":
            return cls(found["field"], found["sign"], _time(found["value"]).isoformat(timespec="seconds"))
        if found["sign"] == "=":
            return cls(found["field"], "=", found["value"])
        if not (value := plainly(found["value"])):
            raise UsageError(f"--where {text!r} has a value that nobody can see, and would pick all; write one")
        return cls(found["field"], "~", value)

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether it is true of a row: `task`, `file`, `added`, `messages`, of what could not be read `raw`."""
        return any(map(self._fits, _FIELDS[self.field][1](row)))

    def _fits(self, found: str) -> bool:
        if self.sign == "=":
            return found == self.value
        if self.sign == "~":
            return any(self.value in reading for reading in readings(found))
        return found < self.value if self.sign == "<" else found > self.value  # All are in UTC, so texts compare.


def all_of(texts: Sequence[str]) -> Callable[[Mapping[str, Any]], bool]:
    """Whether all of these conditions hold for a row. Raises `UsageError`."""
    conditions = [Condition.of(text) for text in texts]
    return lambda row: all(condition.holds(row) for condition in conditions)


def _time(text: str) -> datetime:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{text!r} is no time; write 2026-01-31 or 2026-01-31T12:00:00+00:00") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
