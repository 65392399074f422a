"""The values of a record's fields: under which name, and as what text."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping

from treering.data.names import KNOWN_KEYS, KNOWN_TURN_KEYS, PAIR

Fields = Mapping[str, object]

AS_THEY_ARE = (KNOWN_KEYS | KNOWN_TURN_KEYS) - PAIR
"""Names that need no second look, which most have; those of pairs get one."""

RAW_LENGTH = 2000
"""Characters of what was refused that are kept, for people to see."""

_MARKS = 500
"""Combining marks that a character may have; what people write has a few."""


class RowError(ValueError):
    """Content that cannot be used: `rule` for programs, `reason` for people, `raw` an excerpt where one helps."""

    def __init__(self, rule: str, reason: str, raw: str = "") -> None:
        super().__init__(f"{rule}: {reason}")
        self.rule = rule
        self.reason = reason
        self.raw = raw


def plain(key: object) -> str:
    """The form in which keys and roles are compared."""
    return str(key).strip().lower()


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


def is_blank(value: object) -> bool:
    """Whether nothing is said."""
    return value is None or (isinstance(value, str) and not value.strip())


def called_here(key: object, names: Mapping[str, str]) -> str:
    """What a key from elsewhere is called here, by `names`."""
    name = plain(key)
    return names.get(name, name)


def keyed(items: Iterable[tuple[object, object]], names: Mapping[str, str]) -> dict[str, object]:
    """What `items` say, by the names that keys have here. Raises `RowError` where two have the same."""
    row: dict[str, object] = {}
    for key, value in items:
        name = key if type(key) is str and key in AS_THEY_ARE else called_here(key, names)
        if name != key and isinstance(unpacked(value), str) and name in ("messages", "conversations"):
            name = plain(key)  # A text under another name is no list of turns.
        if row.get(name) is not None and value is None:
            continue
        if row.get(name) is not None and name in KNOWN_KEYS | KNOWN_TURN_KEYS:
            raise RowError("unknown-format", f"two columns or keys are named {name!r}; keep one of them")
        row[name] = value
    return row


def unpacked(value: object) -> object:
    """A list that stands as JSON text, as in a table's cell; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found: list[object] = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found


def text_of(value: object, key: str) -> str:
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
    return clean(value, key)


def content_of(value: object, where: str) -> str:
    """The text of a turn: a string, or OpenAI's list of text parts (one a line)."""
    if isinstance(value, str):
        return clean(value, where)
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    return clean("\n".join(_part(part, where) for part in parts), where)


def _part(part: object, where: str) -> str:
    row = keyed(part.items(), {}) if isinstance(part, Mapping) else {}
    text = row.get("text")
    if row.get("type") != "text":
        raise RowError("bad-turns", f"{where} holds a part whose type is not 'text'; only text can be learned")
    if not isinstance(text, str):
        raise RowError("bad-turns", f"the content of {where} is {kind(text)}; it must be text")
    return text


def clean(text: str, where: str) -> str:
    """The text without the blanks around it. Raises `RowError` where it holds what no text may."""
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
