"""What stays of rows that were deleted on request: keyed hashes, so that they are known if they come again.

A row is known by its id, and by what it says: read from another format, in another case or under another system turn it
has another id. What is no row is known by the text that quarantine had of it, and by what that reads without escapes.

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

from treering.data.example import Example, normalise
from treering.data.spelling import readings
from treering.data.tools import compact
from treering.errors import TreeringError
from treering.files import append_line, fsync_folder, timestamp, whole_lines

FILE, KEY = "deleted.jsonl", ".deleted.key"

_WAY_OUT = "restore both from a backup: without them rows that were deleted would come in again"


def marks(what: Example | str) -> list[str]:
    """By what a row is known, its id first; of what is no row, its text as quarantine has it. No text, no mark."""
    if isinstance(what, str):
        told = readings(what)[-1]
        return [f"text:{_digest(what)}", *([f"reads:{_digest(told)}"] if told else ())] if what else []
    # A turn of nothing but punctuation has no normal form.
    said = [(turn.role, normalise(turn.text) or turn.text.strip()) for turn in what.messages if turn.role != "system"]
    return [what.id, f"said:{_digest(compact(said))}"]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Tombstones:
    """Those of the workspace in `root`. Raises `TreeringError` where they cannot be read, or their key is another."""

    def __init__(self, root: Path) -> None:
        self._path, self._key_path = root / FILE, root / KEY
        self._key = b""
        self._known: set[str] = set()
        self.personal = False
        """Whether some of the rows had personal data, masked or not."""
        if not self._path.exists():
            return
        try:
            self._key = bytes.fromhex(self._key_path.read_text(encoding="ascii"))
            lines = [json.loads(line) for _, line in whole_lines(self._path)]
            self._known = {stone for line in lines for stone in line["rows"]}
            self.personal = any(line.get("personal") for line in lines)
            mine = {line["key"] for line in lines} <= {self._proof()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TreeringError(f"{self._path} or {self._key_path} cannot be read ({error}); {_WAY_OUT}") from None
        if not mine:
            raise TreeringError(f"{self._key_path} is not the key of {self._path}; {_WAY_OUT}")

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, mark: str) -> bool:
        return bool(self._known) and self.of(mark) in self._known

    def know(self, what: Example | str) -> bool:
        """Whether this row, or this text of what is none, was deleted."""
        return bool(self._known) and any(mark in self for mark in marks(what))

    def of(self, mark: str) -> str:
        """The tombstone of the row with this id, or another mark."""
        return hashlib.blake2b(mark.encode(), digest_size=16, key=self._key).hexdigest()

    def add(self, marks: Collection[str], personal: bool = False) -> None:
        """Set those of rows that are to be deleted, some with `personal` data; on disk once this returns."""
        if not marks:
            return
        if not self._key:
            self._key = self._make_key()
        new = sorted({self.of(mark) for mark in marks} - self._known)
        if new:
            append_line(self._path, {"time": timestamp(), "key": self._proof(), "rows": new, "personal": personal})
            self._known.update(new)
            self.personal |= personal

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
