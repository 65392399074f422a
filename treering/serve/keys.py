"""API keys: shown once, kept as hashes, revoked by id."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from treering.errors import TreeringError, UsageError
from treering.files import Watched, timestamp, write_file

if TYPE_CHECKING:
    from treering.workspace import Workspace

FILE = "keys.json"
Scope = Literal["api", "admin"]


class Key(BaseModel):
    """What is kept of a key: not the key itself, but its SHA-256 (32 random bytes need no slower hash)."""

    model_config = ConfigDict(frozen=True)
    id: str
    name: str
    scope: Scope
    sha256: str
    created: str
    requests_per_minute: int | None = None


_FILE = TypeAdapter(list[Key])


def create(ws: Workspace, name: str, scope: str = "api", requests_per_minute: int | None = None) -> tuple[Key, str]:
    """Make a key; returns what is kept of it, and the key itself, which nobody can show again."""
    if scope not in get_args(Scope):
        raise UsageError(f"--scope {scope!r} is unknown; take {' or '.join(get_args(Scope))}")
    secret = f"tr-{secrets.token_urlsafe(32)}"
    with ws.changing("keys create"):
        known = read(ws.root)
        key = Key(
            id=secrets.token_hex(4),
            name=name,
            scope=cast(Scope, scope),
            sha256=_hash(secret),
            created=timestamp(),
            requests_per_minute=requests_per_minute,
        )
        _write(ws.root, [*known, key])
    return key, secret


def revoke(ws: Workspace, id: str) -> Key:
    """Take a key away; a running server refuses it from its next request on. Raises `UsageError` for an unknown one."""
    with ws.changing("keys revoke"):
        known = read(ws.root)
        found = next((key for key in known if key.id == id), None)
        if found is None:
            raise UsageError(f"there is no key {id!r}; there are: {', '.join(key.id for key in known) or 'none'}")
        _write(ws.root, [key for key in known if key.id != id])
    return found


def read(root: Path) -> list[Key]:
    """All keys. Raises `TreeringError` if their file is damaged: then nobody may pass."""
    return _read(root) or []


def _read(root: Path) -> list[Key] | None:
    """All keys; None before the first was made."""
    path = root / FILE
    try:
        return _FILE.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise TreeringError(f"{path} cannot be read ({str(error).splitlines()[0]}); restore it from a backup") from None


class Keys:
    """The keys as a server sees them, whenever they change."""

    def __init__(self, root: Path) -> None:
        self._watched = Watched(root / FILE, lambda: _read(root))

    @property
    def never_made(self) -> bool:
        """Whether there is not even a file of keys. Raises `TreeringError` as `read` does."""
        return self._watched.now() is None

    def all(self) -> list[Key]:
        """The keys as they are now. Raises `TreeringError` as `read` does."""
        return self._watched.now() or []

    def find(self, secret: str) -> Key | None:
        """The key that `secret` is."""
        given = _hash(secret)
        return next((key for key in self.all() if hmac.compare_digest(key.sha256, given)), None)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _write(root: Path, keys: list[Key]) -> None:
    path = root / FILE
    write_file(path, (json.dumps([key.model_dump() for key in keys], indent=1, ensure_ascii=False) + "\n").encode())
    path.chmod(0o600)
