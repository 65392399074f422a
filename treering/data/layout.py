"""How a file's rows are laid out, where that is told and not recognised: container, shape, columns, tags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from treering.data.names import KEYS, KNOWN_KEYS, ROW_KEYS
from treering.data.records import CONTAINERS
from treering.data.shapes import NAMED, known_columns
from treering.data.values import RowError, called_here, plain, unpacked
from treering.errors import UsageError

_ASKED = {key for asked, _ in KEYS.values() for key in asked}
"""Keys of what is asked, which no row lacks."""


@dataclass(frozen=True)
class Tags:
    """Of a turn: the keys of its role and its content, and what the roles are called."""

    role: str = "from"
    content: str = "value"
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """What was told of a file; all that is None or empty is recognised.

    `container`: one of `CONTAINERS`. `shape`: one of `NAMED`. `columns`: for each key of treering's, the file's own;
    only these are read. `tags`: those of turns. `wanted`: a column that is true for rows to learn. `media`: columns
    that hold what is no text.
    """

    container: str | None = None
    shape: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Tags | None = None
    wanted: str | None = None
    media: Sequence[str] = ()

    def header(self, names: Sequence[str]) -> list[str]:
        """Those of a table's columns that are of use. Raises `RowError` where no row of it could be converted."""
        if not self.columns:
            return known_columns(names, self.shape)
        known_columns(list(self.columns), self.shape)
        there = {plain(name) for name in names}
        missing = [name for name in self.columns.values() if plain(name) not in there]
        if missing:
            raise RowError("unknown-format", f"{_listed(missing)} was told, but the columns are {_listed(names)}")
        used = {plain(name) for name in (*self.columns.values(), *self.media, self.wanted) if name}
        return [name for name in names if plain(name) in used]

    def unread(self, names: Iterable[object]) -> list[str]:
        """Which of these keys or columns are not read, though nobody told which are."""
        return [] if self.columns else [str(name) for name in names if called_here(name, ROW_KEYS) not in KNOWN_KEYS]

    def record(self, value: object) -> object:
        """The record with treering's keys. Raises `RowError` for one that is not to be learned."""
        if not isinstance(value, Mapping) or not (self.columns or self.tags or self.wanted or self.media):
            return value
        found = {plain(key): part for key, part in value.items()}
        if any(found.get(plain(name)) for name in self.media):
            raise RowError("bad-turns", "the row has pictures, films or sounds; only text can be learned")
        if self.wanted is not None and not found.get(plain(self.wanted)):
            raise RowError("undesired-answer", f"{self.wanted} is not true: the answer is one not to learn")
        row = value
        if self.columns:
            row = {key: found[plain(name)] for key, name in self.columns.items() if plain(name) in found}
            missing = [name for key, name in self.columns.items() if key in _ASKED and key not in row]
            if missing or not row:
                told = _listed(missing or list(self.columns.values()))
                raise RowError("unknown-format", f"{told} was told, but the keys found are {_listed(list(value))}")
        return {key: self._turns(part) if _holds_turns(key) else part for key, part in row.items()}

    def _turns(self, part: object) -> object:
        if self.tags is None or isinstance(part := unpacked(part), str):
            return part
        return [_tagged(turn, self.tags) for turn in part] if isinstance(part, list) else _tagged(part, self.tags)


def told(format: str | None = None, columns: Mapping[str, str] | str | None = None) -> Layout:
    """A layout as users tell it: `format` `csv`, `alpaca` or `csv,alpaca`, `columns` `question=frage,answer=antwort`.

    Raises `UsageError`.
    """
    container = shape = None
    for name in filter(None, (part.strip().lower() for part in (format or "").split(","))):
        if name in CONTAINERS and container is None:
            container = name
        elif name in NAMED and shape is None:
            shape = name
        else:
            known = f"a container ({', '.join(CONTAINERS)}), a shape ({', '.join(NAMED)}), or one of each"
            raise UsageError(f"--format {format}: {name!r} is not known, or one too many; it takes {known}")
    return Layout(container, shape, _columns(columns or {}))


def _columns(columns: Mapping[str, str] | str) -> dict[str, str]:
    if isinstance(columns, str):
        pairs = [part.partition("=") for part in columns.split(",")]
        if not all(sign and key.strip() and name.strip() for key, sign, name in pairs):
            raise UsageError(f"--columns {columns!r} is no list of pairs; write it as question=frage,answer=antwort")
        columns = {key: name for key, _, name in pairs}
        if len(columns) < len(pairs):
            raise UsageError("--columns names a key twice; name each once")
    found = {plain(key): str(name) for key, name in columns.items()}
    unknown = sorted(found.keys() - KNOWN_KEYS)
    if unknown:
        known = ", ".join(sorted(KNOWN_KEYS))
        raise UsageError(f"--columns: {unknown[0]!r} is no key that a row may have; left of = stands one of {known}")
    return found


def _holds_turns(key: object) -> bool:
    return plain(key) in ("messages", "conversations", "chosen", "rejected")


def _tagged(turn: object, tags: Tags) -> object:
    """The turn with the keys and the roles that are known everywhere."""
    if not isinstance(turn, Mapping) or tags.role not in turn:
        return turn
    role = turn[tags.role]
    others = {key: value for key, value in turn.items() if key not in (tags.role, tags.content)}
    named = tags.roles.get(role, role) if isinstance(role, str) else role
    return {**others, "role": named, "content": turn.get(tags.content)}


def _listed(names: Sequence[object]) -> str:
    return ", ".join(repr(str(name)[:80]) for name in names[:20]) or "none"
