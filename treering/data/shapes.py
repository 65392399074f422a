"""One record, in any of the shapes that chat and label data come in -> one `Example`.

A shape is recognised by its keys alone. When a record fits several, the first of `SHAPES` that has both its question
and its answer wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from treering.data.example import TEXT, Example, Message
from treering.data.names import KEYS, KNOWN_KEYS, PAIR, ROW_KEYS
from treering.data.pairs import against, with_chosen
from treering.data.tools import OFFERED
from treering.data.turns import history, messages, turns_in, with_tools
from treering.data.values import Fields, RowError, called_here, is_blank, keyed, kind, text_of


class Shape(NamedTuple):
    """The keys that may hold the question and the answer, and what turns such a record into messages."""

    question: tuple[str, ...]
    answer: tuple[str, ...]
    build: Callable[[Fields, Shape], list[Message]]


def convert(
    record: object,
    system: str | None = None,
    need_answer: bool = True,
    shape: str | None = None,
    pairs: bool = False,
) -> Example:
    """Turn one record into an example, or raise `RowError`.

    `shape`, one of `NAMED`, says which it is, where that is not to be recognised.
    `system` becomes the system turn of a record that has none. With `need_answer=False` (for prediction) a record may
    lack its answer: the example's messages then end with the user's turn. An answer that is there is kept. With `pairs`
    the rejected answer of a preference pair is kept too.
    """
    if not isinstance(record, Mapping):
        raise RowError("not-an-object", f"the row is {kind(record)}; it must be an object with named values")
    given = keyed(record.items(), ROW_KEYS)
    row = with_chosen(given)
    if shape == PLAIN:
        return _plain_text(row)
    found = _shape_of(row, SHAPES if shape is None else (NAMED[shape],))
    if found.build is not _labelled and str(row.get("label")).strip().lower() == "false":
        # As TRL and LLaMA-Factory write rows of KTO, which are no pairs.
        raise RowError("undesired-answer", "label is false: the answer is one not to learn")
    turns = _with_system(found.build(row, found), system)
    if found.build is not _labelled and not is_blank(row.get(OFFERED)):
        turns = with_tools(turns, row[OFFERED])
    if not need_answer and turns and turns[-1] == Message("assistant", ""):
        turns.pop()
    _require_order(turns)
    if need_answer or turns[-1].role != "user":
        _require_answer(turns[-1], found)
    if pairs and not any(is_blank(given.get(key)) for key in PAIR):
        turns[-1] = against(turns[-1], given["rejected"])
    return Example(tuple(turns))


def is_plain_text(record: object) -> bool:
    """Whether it is a text without a label beside it, or anything else that rows have."""
    if not isinstance(record, Mapping):
        return False
    filled = {called_here(key, ROW_KEYS) for key, value in record.items() if not is_blank(value)}
    named = {called_here(key, ROW_KEYS) for key in record}
    return "text" in filled and not _LABELS & named and not (KNOWN_KEYS - {"text", "context"}) & filled


def _plain_text(row: Fields) -> Example:
    if any(not is_blank(row.get(key)) for key in _LABELS):
        raise RowError("unknown-format", "the file is read as plain text, but this row has a label; use --format")
    text = text_of(row.get("text"), "text")
    if not text:
        raise RowError("no-answer", "text is missing or empty; write it or delete the row")
    return Example((Message(TEXT, text),))


def known_columns(names: Sequence[str], shape: str | None = None) -> list[str]:
    """Those of a table's columns that a shape knows. Raises `RowError` where no row of it could be converted."""
    row = keyed(((name, True) for name in names), ROW_KEYS)  # A header's keys have no values yet.
    if not row.keys() >= PAIR:
        _shape_of(row, SHAPES if shape is None else (NAMED[shape],))
    return [name for name in names if called_here(name, ROW_KEYS) in KNOWN_KEYS]


def _shape_of(row: Fields, shapes: Sequence[Shape]) -> Shape:
    filled = {key for key, value in row.items() if value is not None}
    for shape in shapes:
        if filled.intersection(shape.question) and (not shape.answer or filled.intersection(shape.answer)):
            return shape
    for shape in shapes:
        if set(row).intersection(shape.question):
            return shape
    known = ", ".join("+".join("/".join(keys) for keys in shape[:2] if keys) for shape in shapes)
    found = ", ".join(repr(key[:80]) for key in list(row)[:20]) or "none"
    reason = f"the keys found are {found}; rename them to one of: {known}, or tell what they are (--columns)"
    raise RowError("unknown-format", reason)


def _conversation(row: Fields, shape: Shape) -> list[Message]:
    (key,) = shape.question
    return _top_level_system(row) + messages(row[key], key)


def _alpaca(row: Fields, shape: Shape) -> list[Message]:
    parts = (text_of(row.get("instruction"), "instruction"), text_of(*_only(row, ("input", "context"))))
    asked = Message("user", "\n".join(part for part in parts if part))
    return [*_top_level_system(row), *history(row.get("history")), asked, *_side(row, shape.answer, "assistant")]


def _pair(row: Fields, shape: Shape) -> list[Message]:
    return [*_top_level_system(row), *_side(row, shape.question, "user"), *_side(row, shape.answer, "assistant")]


def _question(row: Fields, shape: Shape) -> list[Message]:
    turns, context = _pair(row, shape), text_of(row.get("context"), "context")
    asked = next((at for at, turn in enumerate(turns) if turn.role == "user"), None)
    if context and asked is not None:  # Where nobody asks, the order of turns is what is wrong.
        turns[asked] = replace(turns[asked], content=f"{context}\n{turns[asked].content}".strip())
    return turns


def _labelled(row: Fields, shape: Shape) -> list[Message]:
    # A table's "system" column may be anything (an operating system, say), so here it is not a system turn.
    text = text_of(*_only(row, shape.question))
    label = text_of(*_only(row, shape.answer))
    return [Message("user", text), Message("assistant", label.replace("_", " ").strip())]


_BUILDERS = {
    "openai": _conversation,
    "sharegpt": _conversation,
    "alpaca": _alpaca,
    "prompt": _pair,
    "question": _question,
    "label": _labelled,
}
NAMED = {name: Shape(*KEYS[name], build) for name, build in _BUILDERS.items()}
SHAPES = tuple(NAMED.values())
PLAIN = "text"
NAMED[PLAIN] = Shape(("text",), (), _labelled)
"""The shapes by the names that users have for them. Plain text is no question and answer (`_plain_text`)."""
_LABELS = frozenset(KEYS["label"][1])


def _top_level_system(row: Fields) -> list[Message]:
    return [Message("system", text_of(row.get("system"), "system"))]


def _side(row: Fields, keys: tuple[str, ...], role: str) -> list[Message]:
    """The question or the answer of a pair: a text, or messages as TRL writes them."""
    value, key = _only(row, keys)
    value = turns_in(value)
    return messages(value, key) if isinstance(value, list) else [Message(role, text_of(value, key))]


def _only(row: Fields, keys: tuple[str, ...]) -> tuple[object, str]:
    filled = [key for key in keys if not is_blank(row.get(key))]
    if len(filled) > 1:
        # Guessing which column is meant would teach the wrong thing without a word.
        both = " and ".join(filled)
        raise RowError("unknown-format", f"{both} are all filled; keep the one to learn and rename the others")
    key = filled[0] if filled else keys[0]
    return row.get(key), key


def _with_system(turns: list[Message], system: str | None) -> list[Message]:
    kept = [turn for turn in turns if turn.role != "system" or turn.text]
    if len(kept) > 1 and kept[0].role == "system" and kept[0] == kept[1]:
        del kept[0]  # said both beside the conversation and in it
    given = text_of(system, "system")
    if given and all(turn.role != "system" for turn in kept):
        kept.insert(0, Message("system", given))
    return kept


def _require_order(turns: list[Message]) -> None:
    if all(turn.role != "user" for turn in turns):
        raise RowError("no-user-turn", "no turn has the role user; add the question")
    for number, turn in enumerate(turns[1:], 2):
        if turn.role == "system":
            raise RowError("bad-turns", f"turn {number} is a system turn; only the first may be")
    for number, turn in enumerate(turns[:-1], 1):
        if turn.role == "assistant" and not turn.text:
            raise RowError("bad-turns", f"turn {number}, an assistant's, is empty; every assistant turn is learned")


def _require_answer(last: Message, shape: Shape) -> None:
    if last.role != "assistant":
        raise RowError("bad-turns", f"the last turn is the {last.role}'s; end with the assistant's answer")
    if not last.text:
        place = " or ".join(shape.answer) or f"the last turn of {shape.question[0]}"
        raise RowError("no-answer", f"{place} is missing or empty; write the answer or delete the row")
    if not last.is_learned:
        raise RowError("undesired-answer", "the last turn has weight 0, and it is the answer to learn; end before it")
