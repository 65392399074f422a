"""What stays of rows that were deleted on request: a keyed hash of each id, so that it is known if it comes again.

The hashes are in `deleted.jsonl`, their key beside it. Neither is in the catalog, so that one which is lost and made
again takes in nothing that was deleted. Without the key nobody can find out from a version whether it had a given row.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Collection
from pathlib import Path

from treering.errors import TreeringError
from treering.files import append_line, fsync_folder, timestamp, whole_lines

FILE, KEY = "deleted.jsonl", ".deleted.key"

_WAY_OUT = "restore both from a backup: without them rows that were deleted would come in again"


class Tombstones:
    """Those of the workspace in `root`. Raises `TreeringError` where they cannot be read, or their key is another."""

    def __init__(self, root: Path) -> None:
        self._path, self._key_path = root / FILE, root / KEY
        self._key = b""
        self._known: set[str] = set()
        if not self._path.exists():
            return
        try:
            self._key = bytes.fromhex(self._key_path.read_text(encoding="ascii"))
            lines = [json.loads(line) for _, line in whole_lines(self._path)]
            self._known = {stone for line in lines for stone in line["rows"]}
            mine = {line["key"] for line in lines} <= {self._proof()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TreeringError(f"{self._path} or {self._key_path} cannot be read ({error}); {_WAY_OUT}") from None
        if not mine:
            raise TreeringError(f"{self._key_path} is not the key of {self._path}; {_WAY_OUT}")

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, id: str) -> bool:
        return bool(self._known) and self.of(id) in self._known

    def of(self, id: str) -> str:
        """The tombstone of the row with this id."""
        return hashlib.blake2b(id.encode(), digest_size=16, key=self._key).hexdigest()

    def add(self, ids: Collection[str]) -> None:
        """Set those of rows that are to be deleted; on disk once this returns."""
        if not self._key:
            self._key = self._make_key()
        new = sorted({self.of(id) for id in ids} - self._known)
        if new:
            append_line(self._path, {"time": timestamp(), "key": self._proof(), "rows": new})
            self._known.update(new)

    def _proof(self) -> str:
        """Tells the key from another without giving it away."""
        return hashlib.blake2b(b"the key of these tombstones", digest_size=8, key=self._key).hexdigest()

    def _make_key(self) -> bytes:
        self._key_path.unlink(missing_ok=True)  # Of a try that a crash ended: nothing was made with it yet.
        key = secrets.token_bytes(32)
        with os.fdopen(os.open(self._key_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key.hex())
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(self._key_path.parent)
        return key
