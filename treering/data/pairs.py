"""Preference pairs: an answer that was chosen, and one that was rejected for it."""

from __future__ import annotations

from collections.abc import Mapping

from treering.data.example import REJECTED, Message, normalise
from treering.data.names import KEYS, PAIR, ROW_KEYS
from treering.data.turns import messages, role_of, turns_in
from treering.data.values import AS_THEY_ARE, RowError, called_here, is_blank, text_of, unpacked

_FLAT = [KEYS[name] for name in ("alpaca", "prompt", "question")]
"""Rows that a pair's question may be from."""


def is_pair(record: object) -> bool:
    """Whether it is a preference pair, of which the chosen answer is learned."""
    if not isinstance(record, Mapping) or len(record) < len(PAIR) or record.keys() <= AS_THEY_ARE:
        return False
    found = {called_here(key, ROW_KEYS): value for key, value in record.items()}
    return found.keys() >= PAIR and not is_blank(found["chosen"])


def with_chosen(row: dict[str, object]) -> dict[str, object]:
    """A preference pair as the row that its chosen answer makes; any other row as it is."""
    if "chosen" not in row or "rejected" not in row or is_blank(row["chosen"]):
        return row
    rest = {key: value for key, value in row.items() if key not in PAIR}
    said = turns_in(row["chosen"])
    turns = said if isinstance(said, list) else [said if isinstance(said, Mapping) else _answered(said)]
    if any(_is_user(turn) for turn in turns):
        return {"messages": turns, "system": row.get("system")}  # The whole conversation, the question included.
    asked = next((key for key in ("messages", "conversations") if not is_blank(row.get(key))), None)
    if asked is None:
        answer = next((answer for (asked,), (answer, *_) in _FLAT if not is_blank(row.get(asked))), None)
        if answer is None:
            raise RowError("unknown-format", "the chosen answer has no question; add it as prompt, or as turns")
        if not is_blank(row.get(answer)):
            raise RowError("unknown-format", f"{answer} and chosen are both filled; keep the one to learn")
        return {**rest, answer: turns}
    before = unpacked(row[asked])
    if not isinstance(before, list) or (before and role_of(before[-1]) == "assistant"):
        return rest
    return {**rest, asked: [*before, *turns]}


def against(chosen: Message, rejected: object) -> Message:
    """The chosen answer, with the one that was rejected for it."""
    rejected = turns_in(rejected)
    if isinstance(rejected, list | Mapping):
        said = messages(rejected if isinstance(rejected, list) else [rejected], "rejected")
    else:
        said = [Message("assistant", text_of(rejected, "rejected"))]
    if not said or said[-1].role != "assistant" or not said[-1].text:
        raise RowError("no-answer", "rejected has no answer; write it or delete the row")
    if normalise(said[-1].text) == normalise(chosen.text):
        raise RowError("equal-answers", "chosen and rejected say the same; correct one of them")
    return Message.of({**chosen.as_dict(), REJECTED: said[-1].text})


def _answered(text: object) -> dict[str, object]:
    return {"role": "assistant", "content": text_of(text, "chosen")}


def _is_user(turn: object) -> bool:
    return role_of(turn) == "user"
