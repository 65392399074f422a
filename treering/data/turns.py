"""The turns of a conversation, in the ways that they are written elsewhere. What cannot be used raises `RowError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from treering.data.example import WEIGHT, Message
from treering.data.names import CALLING, ROLES, TURN_KEYS
from treering.data.tools import CALLED, OFFERED, ToolError, called, compact, offered
from treering.data.values import (
    Fields,
    RowError,
    called_here,
    clean,
    content_of,
    is_blank,
    keyed,
    kind,
    plain,
    text_of,
    unpacked,
)

_OTHERS = {"role": ("speaker", "author"), "content": ("text",)}


def messages(turns: object, key: str) -> list[Message]:
    """A list of turns, or its JSON text, found under `key`."""
    turns = unpacked(turns)
    if not isinstance(turns, list):
        raise RowError("bad-turns", f"{key} is {kind(turns)}; it must be a list of turns")
    return [message for number, turn in enumerate(turns, 1) for message in _turn(turn, f"{key} turn {number}")]


def turns_in(value: object) -> object:
    """The turns that stand as JSON text, as in a table's cell; any other text, though it be JSON, is just that."""
    found = unpacked(value)
    return found if isinstance(found, list) and found and all(map(_is_turn, found)) else value


def _is_turn(value: object) -> bool:
    keys = {called_here(key, TURN_KEYS) for key in value} if isinstance(value, Mapping) else set()
    return role_of(value) is not None and ({"role", "content"} <= keys or {"from", "value"} <= keys)


def _turn(turn: object, where: str) -> list[Message]:
    if not isinstance(turn, Mapping):
        raise RowError("bad-turns", f"{where} is {kind(turn)}; it must be an object with a role and a content")
    row = keyed(turn.items(), TURN_KEYS)
    if "role" not in row and "from" not in row:
        said = [(ROLES[key], value) for key, value in row.items() if key in ROLES and not is_blank(value)]
        if sorted(role for role, _ in said) in (["assistant", "user"], ["user"]):
            # Both sides of an exchange, by role.
            return [Message(role, content_of(value, where)) for role, value in sorted(said, key=_first, reverse=True)]
    role = _role(_either(row, "role", "from"), where)
    content, extra = _either(row, "content", "value"), dict[str, object]()
    try:
        if plain(_either(row, "role", "from")) in CALLING and not row.get(CALLED):
            extra, content = {CALLED: called(content)}, None  # ShareGPT: the text of such a turn is the call.
        elif role == "assistant" and (calls := row.get(CALLED) or row.get("function_call")):
            extra = {CALLED: called(calls)}  # OpenAI had `function_call` before there were several.
    except ToolError as error:
        raise RowError("bad-turns", f"{where}: {error}") from None
    if role == "tool":
        extra = {key: row[key] for key in ("name", "tool_call_id") if isinstance(row.get(key), str) and row[key]}
    if content is None and not extra:
        _raise_empty(row, where)
    text = "" if content is None else content_of(content, where)
    if role == "assistant" and (weight := row.get(WEIGHT)) is not None:
        if weight not in (0, 1):
            raise RowError("bad-turns", f"the weight of {where} is {str(weight)[:80]}; it must be 0 or 1")
        extra = {**extra, WEIGHT: weight}
    return [_with_extra(Message(role, text), extra, where)]


def _raise_empty(row: Fields, where: str) -> NoReturn:
    others = [repr(key[:80]) for key, value in row.items() if not is_blank(value) and key not in ("role", "from")]
    rest = f", and beside it is only {', '.join(others[:10])}" if others else ""
    raise RowError("bad-turns", f"the content of {where} is null{rest}; it must be text")


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


def _first(pair: tuple[str, object]) -> str:
    return pair[0]


def with_tools(turns: list[Message], tools: object) -> list[Message]:
    """The tools stand with the system turn, so that whoever has a prompt has them too."""
    try:
        extra = {OFFERED: offered(tools)}
    except ToolError as error:
        raise RowError("bad-turns", str(error)) from None
    first, *rest = turns if turns and turns[0].role == "system" else [Message("system", ""), *turns]
    return [_with_extra(first, extra, OFFERED), *rest] if extra[OFFERED] else turns


def _with_extra(message: Message, extra: Fields, where: str) -> Message:
    clean(compact(extra), where)
    return Message.of({**message.as_dict(), **extra})


def role_of(turn: object) -> str | None:
    """Whose turn it is; None where that is not known."""
    if not isinstance(turn, Mapping):
        return None
    role = _either({called_here(key, TURN_KEYS): value for key, value in turn.items()}, "role", "from")
    return ROLES.get(plain(role))


def history(pairs: object) -> list[Message]:
    """Alpaca's earlier turns: pairs of what was asked and answered."""
    if is_blank(pairs):
        return []
    pairs = unpacked(pairs)
    if not isinstance(pairs, list):
        raise RowError("bad-turns", f"history is {kind(pairs)}; it must be a list of [user, assistant] pairs")
    turns = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError("bad-turns", f"history entry {number} is not a [user, assistant] pair")
        asked, answered = (text_of(part, f"history entry {number}") for part in pair)
        turns += [Message("user", asked), Message("assistant", answered)]
    return turns
