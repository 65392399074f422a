"""JSON and JSON Lines."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from treering.data.containers import Found, Source
from treering.data.containers.text import LONGEST_LINE, CutLine, Text
from treering.data.values import RAW_LENGTH, RowError, plain

LONGEST_LIST, LONGEST_JSON = 1 << 24, 1 << 26
"""Characters of a JSON text that is read whole, of a list and of anything else; a longer list is read element by
element."""

_PIECE = 1 << 20
_WRAPPERS = ("data", "train", "rows")
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_FILLED = re.compile(r"[^ \t\r\n]")
# What is left of a number or an escape where JSON was cut inside it.
_CUT = re.compile(r"\.|[eE][+-]?|\\?u?[0-9a-fA-F]{0,4}")


@dataclass(frozen=True)
class _Refused:
    """Stands in decoded JSON for what Python would take although no two readers agree on it."""

    reason: str
    value: object

    def __str__(self) -> str:
        return str(self.value)


def read_json(source: Source, lines: bool) -> Iterator[Found]:
    """JSON Lines where `lines`, else one JSON value; each is recognised under the other's name."""
    text = Text(source)
    first, second = text.first_lines()
    if lines and not first.startswith("["):
        yield from _json_lines(text)
    elif first:
        try:
            found = _whole(text, first)
        except RowError:
            if not (lines or _are_rows(first, second)):
                raise
            found = _json_lines(text)
        yield from found


def _whole(text: Text, first: str) -> Iterator[Found]:
    is_list = first.startswith("[")
    most = LONGEST_LIST if is_list else LONGEST_JSON
    with text.open() as file:
        content = file.read(most + 1)
    if len(content) <= most:
        return _elements(_decode(content))
    if is_list:
        return _streamed(text)
    raise RowError("too-large", f"the JSON has more than {most:,} characters; write a row a line (.jsonl)")


def _streamed(text: Text) -> Iterator[Found]:
    """The elements of a list that is too long to be read whole. Raises `RowError` where it breaks off or goes wrong."""
    with text.open() as file:
        buffer, at, number = file.read(_PIECE), 0, 0
        at = _filled(buffer, 0) + 1
        while True:
            try:
                value, at, more = _element(buffer, at, number)
            except (json.JSONDecodeError, RecursionError) as error:
                piece = file.read(max(_PIECE, len(buffer) - at)) if len(buffer) - at < LONGEST_LINE else ""
                if not piece:
                    place = f"the JSON goes wrong after element {number}"
                    raise RowError("bad-json", f"{place} ({error}); correct it there", buffer[at : at + 1000]) from None
                buffer, at = buffer[at:] + piece, 0
                continue
            if not more:
                break
            number += 1
            yield Found(number, value, error=_refusal(value))
        if buffer[at:].strip() or any(line.strip() for line in iter(partial(file.read, _PIECE), "")):
            raise RowError("bad-json", f"there is more after the list of {number} elements; delete it", buffer[at:])


def _element(buffer: str, at: int, number: int) -> tuple[object, int, bool]:
    """The element from `at` on, where it ends, and whether it is one and not the list's end."""
    at = _filled(buffer, at)
    if buffer.startswith("]", at):
        return None, at + 1, False
    if number:
        if not buffer.startswith(",", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", buffer, at)
        at = _filled(buffer, at + 1)
    value, end = _DECODER.raw_decode(buffer, at)
    if end == len(buffer):  # A number may go on in the next piece.
        raise json.JSONDecodeError("Unterminated list", buffer, at)
    return value, end, True


def _filled(buffer: str, at: int) -> int:
    found = _FILLED.search(buffer, at)
    return found.start() if found else len(buffer)


def _once_each(pairs: list[tuple[str, object]]) -> object:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
    return _Refused(f"the key {twice[:80]!r} stands twice in one object; keep one of them", pairs)


def _integer(digits: str) -> object:
    try:
        return int(digits)
    except ValueError:
        return _Refused(f"an integer has {len(digits)} digits; write it as text", digits)


def _constant(name: str) -> object:
    return _Refused(f"{name} is not JSON; write null or a text", name)


_DECODER = json.JSONDecoder(object_pairs_hook=_once_each, parse_int=_integer, parse_constant=_constant)


def _are_rows(first: str, second: str) -> bool:
    # In one JSON object laid out over lines, no line after the first starts a second object.
    return first.startswith("{") and (second.startswith("{") or (first.endswith("}") and second != ""))


def _json_lines(text: Text) -> Iterator[Found]:
    lines, again = enumerate(text.lines(), 1), deque[tuple[int, str]]()
    while entry := again.popleft() if again else next(lines, None):
        number, line = entry
        if line.strip():
            found = _json_line(number, line)
            yield (found.error and _over_lines(number, line, lines, again)) or found


def _over_lines(
    number: int, first: str, lines: Iterator[tuple[int, str]], again: deque[tuple[int, str]]
) -> Found | None:
    """A row that is laid out over lines from `first` on; else None, and what was looked at is to be read `again`."""
    parts, taken, depth, size = [first], list[tuple[int, str]](), _opened(first), len(first)
    while first.startswith("{") and depth > 0 and size < _PIECE:
        entry = again.popleft() if again else next(lines, None)
        if entry is None:
            break
        taken.append(entry)
        if entry[1].startswith("{"):  # Another row begins: the first breaks off.
            break
        parts.append(entry[1])
        depth += _opened(entry[1])
        size += len(entry[1])
    whole = "".join(parts)
    if taken and depth == 0 and _is_json(whole):
        reason = (
            f"this row is laid out over lines {number} to {taken[-1][0]}, but in JSON Lines each has one: write it so "
            "(`jq -c . FILE` does), or name a file that is one list or object .json"
        )
        return Found(number, None, whole[:RAW_LENGTH], RowError("bad-json", reason))
    again.extendleft(reversed(taken))
    return None


def _opened(line: str) -> int:
    return line.count("{") - line.count("}")


def _is_json(text: str) -> bool:
    try:
        _decode(text)
    except RowError:
        return False
    return True


def _json_line(number: int, line: str) -> Found:
    if isinstance(line, CutLine):
        reason = f"the line has more than {LONGEST_LINE:,} characters; give each row a line of its own"
        return Found(number, None, line[:RAW_LENGTH], RowError("too-large", reason))
    line = line.rstrip()
    try:
        value = _decode(line)
    except RowError as error:
        return Found(number, None, line, error)
    return Found(number, value, line, _refusal(value))


def _elements(value: object) -> Iterator[Found]:
    rows = value if isinstance(value, list) else _wrapped(value)
    return (Found(number, row, error=_refusal(row)) for number, row in enumerate(rows, 1))


def _wrapped(value: object) -> list[object]:
    """The rows under an object's `data`, `train` or `rows`; any other value is itself the one row."""
    named = value.items() if isinstance(value, dict) else ()
    tables: dict[str, list[object]] = {key: rows for key, rows in named if _is_table(key, rows)}
    wrappers = [key for key in tables if plain(key) in _WRAPPERS]
    if not wrappers:
        return [value]
    if len(tables) > 1:
        names = " and ".join(repr(key[:80]) for key in tables)
        raise RowError("unknown-format", f"the lists {names} stand in one file; give each a file of its own")
    return tables[wrappers[0]]


def _is_table(key: str, value: object) -> bool:
    return isinstance(value, list) and (plain(key) in _WRAPPERS or any(isinstance(row, dict) for row in value))


def _refusal(value: object) -> RowError | None:
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, _Refused):
            return RowError("bad-json", part.reason)
        if isinstance(part, dict | list):
            waiting.extend(part.values() if isinstance(part, dict) else part)
    return None


def _decode(text: str) -> object:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise RowError("bad-json", "the JSON is nested too deep; a row needs a few levels", text[:200]) from None
    except json.JSONDecodeError as error:
        raise _json_error(error) from None


def _json_error(error: json.JSONDecodeError) -> RowError:
    line = f"line {error.lineno} " if "\n" in error.doc else ""
    place = f"{error.msg.removesuffix(' at')} at {line}column {error.colno}"
    around = error.doc[max(0, error.pos - 1000) : error.pos + 1000]
    if error.msg.startswith("Unterminated") or _is_cut(error.doc[error.pos : error.pos + 20].rstrip()):
        return RowError("truncated-json", f"the JSON breaks off ({place}); write it again, whole", around)
    return RowError("bad-json", f"this is not JSON ({place}); correct it there", around)


def _is_cut(rest: str) -> bool:
    return any(word.startswith(rest) for word in _WORDS) or _CUT.fullmatch(rest) is not None
