"""What people do with rows in quarantine: look, correct, take in all the same, write out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.data.dedup import LEAKAGE, TRAINED
from treering.data.example import Example
from treering.data.export import QUARANTINED, noted
from treering.data.intake import DELETED, Ingested, retake
from treering.data.read import CORRECTED, Row, RowError, convert
from treering.data.rules import ALL
from treering.data.writer import HELD, Split
from treering.errors import UsageError

if TYPE_CHECKING:
    from treering.workspace import Workspace

_FINAL = {
    LEAKAGE: "a held-out row says nearly the same, and what judges is never learned",
    TRAINED: "a version has learned it, so it cannot judge",
    DELETED: "nothing of it is kept",
    **dict.fromkeys(
        (name for name, rule in ALL.items() if "off" not in rule.levels), "the model cannot take it as it is"
    ),
}
"""Rules whose rows cannot be taken in as they are, and why."""


def listed(ws: Workspace, rule: str | None = None, task: str | None = None) -> list[dict[str, Any]]:
    """The rows in quarantine, of a rule or a task.

    Each has `number`, `task`, `split`, `file`, `line`, `rule`, `reason`, `raw`, `added` and its `messages` (None where
    it is no row).
    """
    found = []
    for entry in ws.catalog.quarantined():
        if (rule is None or entry["rule"] == rule) and (task is None or entry["task"] == task):
            messages = entry.pop("messages")
            found.append({"number": entry.pop("seq"), **entry, "messages": messages and json.loads(messages)})
    return found


def get(ws: Workspace, number: int) -> dict[str, Any]:
    """The row with that number, as `listed`. Raises `UsageError` if there is none."""
    return _several(ws, [number])[0]


def _several(ws: Workspace, numbers: Sequence[int]) -> list[dict[str, Any]]:
    found = {entry["number"]: entry for entry in listed(ws)}
    for number in numbers:
        if number not in found:
            raise UsageError(f"there is no row {number} in quarantine; `treering quarantine list` has the numbers")
    return [found[number] for number in dict.fromkeys(numbers)]


def release(ws: Workspace, numbers: Sequence[int]) -> Ingested:
    """Take rows in as they are, past the rules that refused them; they count as the newest.

    Raises `UsageError`, and takes none, where one cannot be: it is no row, or its rule is one that nobody may waive.
    """
    entries = _several(ws, numbers)
    for entry in entries:
        number, rule = entry["number"], entry["rule"]
        if rule in _FINAL:
            raise UsageError(f"row {number} was refused by {rule}: {_FINAL[rule]}; correct it with `quarantine fix`")
        if entry["messages"] is None:
            raise UsageError(f"row {number} could not be read ({rule}); correct it with `quarantine fix`")
    return retake(ws, [_released(entry) for entry in entries], checked=False)


def _released(entry: Mapping[str, Any]) -> tuple[int, str, Split, Row]:
    # A row that was set aside goes back to the side it was on; told to be held out, it would count as the user's own.
    side: Split = "train" if entry["rule"] == HELD else entry["split"]
    return entry["number"], entry["task"], side, Row(entry["file"], entry["line"], Example.of(entry["messages"]))


def fix(ws: Workspace, number: int, record: Mapping[str, Any]) -> Ingested:
    """Take `record`, in any known shape, in place of a row; it is checked as any other.

    Raises `UsageError` where it is refused again; then the old one stays.
    """
    entry = get(ws, number)
    if entry["rule"] == HELD:
        raise UsageError(
            f"row {number} can be read, but what learned it was held: take it back with `quarantine release {number}`, "
            "and ingest what is true of it"
        )
    try:
        example = convert(record, system=ws.config().default_system)
    except RowError as error:
        raise UsageError(f"the corrected row is refused, {error}") from None
    # Of that file it is not, which when it is read again says what it said.
    row = Row(entry["file"].removesuffix(CORRECTED) + CORRECTED, entry["line"], example)
    return retake(ws, [(number, entry["task"], entry["split"], row)], checked=True)


def export(ws: Workspace, file: Path, rule: str | None = None, task: str | None = None) -> int:
    """Write rows as JSON Lines, to be corrected and ingested: as `messages` where they are rows, else as `raw`, each
    with where it stood, the rule and the reason. Returns how many.

    The file is noted, so that rows which are deleted later can be taken out of it again.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"{file} is no file in an existing folder; name one")
    with noted(ws, file, QUARANTINED) as out:
        found = listed(ws, rule, task)
        out.writelines(json.dumps(_written(entry), ensure_ascii=False).encode() + b"\n" for entry in found)
    return len(found)


def _written(entry: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"messages": entry["messages"]} if entry["messages"] else {"raw": entry["raw"]}
    return content | {key: entry[key] for key in ("task", "file", "line", "rule", "reason")}


def rules(entries: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many there are of each rule, most first."""
    return dict(Counter(entry["rule"] for entry in entries).most_common())
