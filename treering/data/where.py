"""Conditions that pick rows: `task=coffee`, `text~jane@example.com`, `added<2026-01-31`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from treering.errors import UsageError

_CONDITION = re.compile(r"\s*(?P<field>\w+)\s*(?P<sign>[=~<>])\s*(?P<value>.*?)\s*", re.DOTALL)


def _text(row: Mapping[str, Any]) -> str:
    turns = row["messages"]
    return "\n".join(turn["content"] for turn in turns) if turns else str(row.get("raw", ""))


_FIELDS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "task": ("=~", lambda row: str(row["task"])),
    "file": ("=~", lambda row: str(row["file"])),
    "answer": ("=~", lambda row: str(row["messages"][-1]["content"]) if row["messages"] else ""),
    "text": ("~", _text),
    "added": ("<>", lambda row: str(row["added"])),
}
"""Which signs each field takes, and where it stands in a row."""


@dataclass(frozen=True)
class Condition:
    """One of them. `=`: the same text; `~`: has it somewhere, in any case; `<` and `>`: before and after a time."""

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
        return cls(found["field"], found["sign"], found["value"])

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether it is true of a row: `task`, `file`, `added`, `messages`, of what could not be read `raw`."""
        found = _FIELDS[self.field][1](row)
        if self.sign == "=":
            return found == self.value
        if self.sign == "~":
            return self.value.casefold() in found.casefold()
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
