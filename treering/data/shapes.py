"""One record, in any of the shapes that chat and label data come in -> one `Example`.

A shape is recognised by its keys alone. When a record fits several, the first of `SHAPES` that has both its question
and its answer wins.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from treering.data.example import REJECTED, TEXT, Example, Message, normalise
from treering.data.names import CALLING, ROLES, ROW_KEYS, TURN_KEYS
from treering.data.tools import CALLED, OFFERED, ToolError, called, compact, offered


class RowError(ValueError):
    """Content that cannot be used: `rule` for programs, `reason` for people, `raw` an excerpt where one helps."""

    def __init__(self, rule: str, reason: str, raw: str = "") -> None:
        super().__init__(f"{rule}: {reason}")
        self.rule = rule
        self.reason = reason
        self.raw = raw


_MARKS = 500
"""Combining marks that a character may have; what people write has a few."""

Fields = Mapping[str, object]


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
    given = _keyed(record.items(), ROW_KEYS)
    row = _with_chosen(given)
    if shape == PLAIN:
        return _plain_text(row)
    found = _shape_of(row, SHAPES if shape is None else (NAMED[shape],))
    turns = _with_system(found.build(row, found), system)
    if found.build is not _labelled and not _is_blank(row.get(OFFERED)):
        turns = _with_tools(turns, row[OFFERED])
    if not need_answer and turns and turns[-1] == Message("assistant", ""):
        turns.pop()
    _require_order(turns)
    if need_answer or turns[-1].role != "user":
        _require_answer(turns[-1], found)
    if pairs and not any(_is_blank(given.get(key)) for key in PAIR):
        turns[-1] = _against(turns[-1], given["rejected"])
    return Example(tuple(turns))


def plain(key: object) -> str:
    """The form in which keys and roles are compared."""
    return str(key).strip().lower()


def is_plain_text(record: object) -> bool:
    """Whether it is a text without a label beside it, or anything else that rows have."""
    if not isinstance(record, Mapping):
        return False
    filled = {_called(key, ROW_KEYS) for key, value in record.items() if not _is_blank(value)}
    named = {_called(key, ROW_KEYS) for key in record}
    return "text" in filled and not LABELS & named and not (KNOWN_KEYS - {"text"}) & filled


def _plain_text(row: Fields) -> Example:
    if any(not _is_blank(row.get(key)) for key in LABELS):
        raise RowError("unknown-format", "the file is read as plain text, but this row has a label; use --format")
    text = _text(row.get("text"), "text")
    if not text:
        raise RowError("no-answer", "text is missing or empty; write it or delete the row")
    return Example((Message(TEXT, text),))


def known_columns(names: Sequence[str], shape: str | None = None) -> list[str]:
    """Those of a table's columns that a shape knows. Raises `RowError` where no row of it could be converted."""
    row = _keyed(((name, None) for name in names), ROW_KEYS)
    if not row.keys() >= PAIR:
        _shape_of(row, SHAPES if shape is None else (NAMED[shape],))
    return [name for name in names if _called(name, ROW_KEYS) in KNOWN_KEYS]


def is_pair(record: object) -> bool:
    """Whether it is a preference pair, of which the chosen answer is learned."""
    if not isinstance(record, Mapping) or len(record) < len(PAIR) or record.keys() <= _AS_THEY_ARE:
        return False
    found = {_called(key, ROW_KEYS): value for key, value in record.items()}
    return found.keys() >= PAIR and not _is_blank(found["chosen"])


def _called(key: object, names: Mapping[str, str]) -> str:
    name = plain(key)
    return names.get(name, name)


def _keyed(items: Iterable[tuple[object, object]], names: Mapping[str, str]) -> dict[str, object]:
    row: dict[str, object] = {}
    for key, value in items:
        name = key if type(key) is str and key in _AS_THEY_ARE else _called(key, names)
        if name != key and isinstance(value, str) and name in ("messages", "conversations"):
            name = plain(key)  # A text under another name is no list of turns.
        if name in row and name in KNOWN_KEYS | _TURN_KEYS:
            raise RowError("unknown-format", f"two columns or keys are named {name!r}; keep one of them")
        row[name] = value
    return row


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


def _with_chosen(row: dict[str, object]) -> dict[str, object]:
    """A preference pair as the row that its chosen answer makes; any other row as it is."""
    if "chosen" not in row or "rejected" not in row or _is_blank(row["chosen"]):
        return row
    rest = {key: value for key, value in row.items() if key not in PAIR}
    said = row["chosen"]
    turns = said if isinstance(said, list) else [said if isinstance(said, Mapping) else _answered(said)]
    if any(_is_user(turn) for turn in turns):
        return {"messages": turns, "system": row.get("system")}  # The whole conversation, the question included.
    asked = next((key for key in ("messages", "conversations") if not _is_blank(row.get(key))), None)
    if asked is None:
        answer = next((shape.answer[0] for shape in SHAPES[2:5] if not _is_blank(row.get(shape.question[0]))), None)
        if answer is None:
            raise RowError("unknown-format", "the chosen answer has no question; add it as prompt, or as turns")
        if not _is_blank(row.get(answer)):
            raise RowError("unknown-format", f"{answer} and chosen are both filled; keep the one to learn")
        return {**rest, answer: turns}
    before = row[asked]
    if not isinstance(before, list) or (before and _role_of(before[-1]) == "assistant"):
        return rest
    return {**rest, asked: [*before, *turns]}


def _against(chosen: Message, rejected: object) -> Message:
    """The chosen answer, with the one that was rejected for it."""
    if isinstance(rejected, list | Mapping):
        said = _messages(rejected if isinstance(rejected, list) else [rejected], "rejected")
    else:
        said = [Message("assistant", _text(rejected, "rejected"))]
    if not said or said[-1].role != "assistant" or not said[-1].text:
        raise RowError("no-answer", "rejected has no answer; write it or delete the row")
    if normalise(said[-1].text) == normalise(chosen.text):
        raise RowError("equal-answers", "chosen and rejected say the same; correct one of them")
    return Message.of({**chosen.as_dict(), REJECTED: said[-1].text})


def _answered(text: object) -> dict[str, object]:
    return {"role": "assistant", "content": _text(text, "chosen")}


def _is_user(turn: object) -> bool:
    return _role_of(turn) == "user"


def _role_of(turn: object) -> str | None:
    """Whose turn it is; None where that is not known."""
    if not isinstance(turn, Mapping):
        return None
    role = _either({_called(key, TURN_KEYS): value for key, value in turn.items()}, "role", "from")
    return ROLES.get(plain(role))


def _conversation(row: Fields, shape: Shape) -> list[Message]:
    (key,) = shape.question
    return _top_level_system(row) + _messages(row[key], key)


def _alpaca(row: Fields, shape: Shape) -> list[Message]:
    parts = (_text(row.get("instruction"), "instruction"), _text(row.get("input"), "input"))
    asked = Message("user", "\n".join(part for part in parts if part))
    return [*_top_level_system(row), *_history(row.get("history")), asked, *_side(row, shape.answer, "assistant")]


def _pair(row: Fields, shape: Shape) -> list[Message]:
    return [*_top_level_system(row), *_side(row, shape.question, "user"), *_side(row, shape.answer, "assistant")]


def _labelled(row: Fields, shape: Shape) -> list[Message]:
    # A table's "system" column may be anything (an operating system, say), so here it is not a system turn.
    text = _text(*_only(row, shape.question))
    label = _text(*_only(row, shape.answer))
    return [Message("user", text), Message("assistant", label.replace("_", " ").strip())]


SHAPES = (
    Shape(("messages",), (), _conversation),
    Shape(("conversations",), (), _conversation),
    Shape(("instruction",), ("output",), _alpaca),
    Shape(("prompt",), ("completion", "response"), _pair),
    Shape(("question",), ("answer",), _pair),
    Shape(("text", "sentence", "utterance", "message", "query"), ("label", "category", "intent"), _labelled),
)
PLAIN = "text"
NAMED = dict(zip(("openai", "sharegpt", "alpaca", "prompt", "question", "label"), SHAPES, strict=True))
NAMED[PLAIN] = Shape(("text",), (), _labelled)
"""The shapes by the names that users have for them. Plain text is no question and answer (`_plain_text`)."""
LABELS = frozenset(SHAPES[5].answer)
PAIR = frozenset({"chosen", "rejected"})
KNOWN_KEYS = frozenset(
    {"system", "input", "history", OFFERED, *PAIR}.union(*(shape.question + shape.answer for shape in SHAPES))
)
_OTHERS = {"role": ("speaker", "author"), "content": ("text",)}
_TURN_KEYS = frozenset({"role", "from", "content", "value", "type", "name", "tool_call_id", CALLED})


# Names that need no second look, which most have; those of pairs get one.
_AS_THEY_ARE = (KNOWN_KEYS | _TURN_KEYS) - PAIR


def _top_level_system(row: Fields) -> list[Message]:
    return [Message("system", _text(row.get("system"), "system"))]


def _side(row: Fields, keys: tuple[str, ...], role: str) -> list[Message]:
    """The question or the answer of a pair: a text, or messages as TRL writes them."""
    value, key = _only(row, keys)
    return _messages(value, key) if isinstance(value, list) else [Message(role, _text(value, key))]


def _only(row: Fields, keys: tuple[str, ...]) -> tuple[object, str]:
    filled = [key for key in keys if not _is_blank(row.get(key))]
    if len(filled) > 1:
        # Guessing which column is meant would teach the wrong thing without a word.
        both = " and ".join(filled)
        raise RowError("unknown-format", f"{both} are all filled; keep the one to learn and rename the others")
    key = filled[0] if filled else keys[0]
    return row.get(key), key


def _is_blank(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _history(pairs: object) -> list[Message]:
    if _is_blank(pairs):
        return []
    if not isinstance(pairs, list):
        raise RowError("bad-turns", f"history is {kind(pairs)}; it must be a list of [user, assistant] pairs")
    turns = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("bad-turns", f"history entry {number} is not a [user, assistant] pair")
        asked, answered = (_text(part, f"history entry {number}") for part in pair)
        turns += [Message("user", asked), Message("assistant", answered)]
    return turns


def _messages(turns: object, key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise RowError("bad-turns", f"{key} is {kind(turns)}; it must be a list of turns")
    return [message for number, turn in enumerate(turns, 1) for message in _turn(turn, f"{key} turn {number}")]


def _turn(turn: object, where: str) -> list[Message]:
    if not isinstance(turn, Mapping):
        raise RowError("bad-turns", f"{where} is {kind(turn)}; it must be an object with a role and a content")
    row = _keyed(turn.items(), TURN_KEYS)
    if "role" not in row and "from" not in row:
        said = [(ROLES[key], value) for key, value in row.items() if key in ROLES and not _is_blank(value)]
        if sorted(role for role, _ in said) in (["assistant", "user"], ["user"]):
            # Both sides of an exchange, by role.
            return [Message(role, _content(value, where)) for role, value in sorted(said, key=_first, reverse=True)]
    role = _role(_either(row, "role", "from"), where)
    content, extra = _either(row, "content", "value"), dict[str, object]()
    try:
        if plain(_either(row, "role", "from")) in CALLING and not row.get(CALLED):
            extra, content = {CALLED: called(content)}, None  # ShareGPT: the text of such a turn is the call.
        elif role == "assistant" and row.get(CALLED):
            extra = {CALLED: called(row[CALLED])}
    except ToolError as error:
        raise RowError("bad-turns", f"{where}: {error}") from None
    if role == "tool":
        extra = {key: row[key] for key in ("name", "tool_call_id") if isinstance(row.get(key), str) and row[key]}
    text = "" if extra and content is None else _content(content, where)
    return [_with_extra(Message(role, text), extra, where)]


def _with_tools(turns: list[Message], tools: object) -> list[Message]:
    """The tools stand with the system turn, so that whoever has a prompt has them too."""
    try:
        extra = {OFFERED: offered(tools)}
    except ToolError as error:
        raise RowError("bad-turns", str(error)) from None
    first, *rest = turns if turns and turns[0].role == "system" else [Message("system", ""), *turns]
    return [_with_extra(first, extra, OFFERED), *rest] if extra[OFFERED] else turns


def _with_extra(message: Message, extra: Fields, where: str) -> Message:
    _clean(compact(extra), where)
    return Message.of({**message.as_dict(), **extra})


def _first(pair: tuple[str, object]) -> str:
    return pair[0]


def _either(row: Fields, openai: str, sharegpt: str) -> object:
    # Parquet fills the keys that a turn lacks with null.
    for key in (openai, sharegpt, *_OTHERS[openai]):
        if (value := row.get(key)) is not None:
            return value
    return None


def _role(name: object, where: str) -> str:
    if not isinstance(name, str) or plain(name) not in ROLES:
        found = repr(name[:80]) if isinstance(name, str) else kind(name)
        known = ", ".join(name for name in ROLES if name.isascii())
        raise RowError("bad-turns", f"the role of {where} is {found}; known are {known}")
    return ROLES[plain(name)]


def _content(value: object, where: str) -> str:
    """The text of a turn: a string, or OpenAI's list of text parts (one a line)."""
    if isinstance(value, str):
        return _clean(value, where)
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    return _clean("\n".join(_part(part, where) for part in parts), where)


def _part(part: object, where: str) -> str:
    row = _keyed(part.items(), {}) if isinstance(part, Mapping) else {}
    text = row.get("text")
    if row.get("type") != "text":
        raise RowError("bad-turns", f"{where} holds a part whose type is not 'text'; only text can be learned")
    if not isinstance(text, str):
        raise RowError("bad-turns", f"the content of {where} is {kind(text)}; it must be text")
    return text


def _text(value: object, key: str) -> str:
    """The text of a flat field; null is empty, and whole numbers (label codes, sums) are their decimal text."""
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # From Python: files cannot bring one.
            raise RowError("bad-turns", f"{key} is a number of too many digits; write it as text") from None
    if not isinstance(value, str):
        raise RowError("bad-turns", f"{key} is {kind(value)}; write it as text")
    return _clean(value, key)


def _clean(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise RowError("encoding", f"{where} holds {half}, half of a character (a lone surrogate); delete it") from None
    if len(text) > _MARKS and not text.isascii() and _piled_up(text):
        raise RowError("encoding", f"{where} has a character with more than {_MARKS} combining marks; delete them")
    return text.strip()


def _piled_up(text: str) -> bool:
    """Whether a character has so many marks that Unicode's order of them, which takes a square, takes long."""
    return b"\1" * (_MARKS + 1) in bytes(map(bool, map(unicodedata.combining, text)))


def kind(value: object) -> str:
    """The type of a value in words that need no Python."""
    words = {
        type(None): "null",
        str: "text",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        bool: "a truth value",
    }
    return words.get(type(value), f"a value of type {type(value).__name__}")


def _with_system(turns: list[Message], system: str | None) -> list[Message]:
    kept = [turn for turn in turns if turn.role != "system" or turn.text]
    if len(kept) > 1 and kept[0].role == "system" and kept[0] == kept[1]:
        del kept[0]  # said both beside the conversation and in it
    given = _text(system, "system")
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
