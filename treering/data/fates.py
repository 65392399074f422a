"""What may become of an incoming row."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

from treering.data.read import Row
from treering.data.writer import Known, Split, Stored

Fate = Literal["new", "duplicate", "aside", "to_held_out", "already_trained"]


def fate(id: str, split: Split, known: Mapping[str, Known], trained: Set[str]) -> Fate:
    """What to do with an incoming row, by its id alone.

    `known` maps the ids already met to where they are; `trained` holds the ids that a version has learned.
    A held-out row is held out everywhere: it is never stored for training, and a stored training row moves to the
    held-out side when a user's file names it, unless some version has already learned it. A row that was set aside
    (`aside`) after a hold stays so until the user names its file; one that is superseded, or left out because another
    says the same, stays so when its file is read again.
    """
    where = known.get(id)
    if where is None or (where == "like" and split == "held_out"):
        return "already_trained" if split == "held_out" and id in trained else "new"
    if where == "aside" and split == "train":
        return "aside"
    if split == "train" or where in ("held_out", "superseded"):
        return "duplicate"
    return "already_trained" if id in trained else "to_held_out"


@dataclass
class Judged:
    """An incoming row and what becomes of it; a new one is stored as `stored`.

    `refused` is why it goes to quarantine instead, a rule and a reason; `like` the id of a row that says the same, for
    which it is left out. `replaces` are stored rows that it makes untrue, `removes` those that go to quarantine for it,
    each with a rule and a reason. `was`: how it is stored until now, where it is no longer true, but is said anew.
    """

    row: Row
    fate: Fate
    stored: Stored | None = None
    refused: tuple[str, str] | None = None
    like: str | None = None
    replaces: list[Stored] = field(default_factory=list)
    removes: list[tuple[Stored, str, str]] = field(default_factory=list)
    was: Stored | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it is to be stored."""
        return self.fate == "new" and self.refused is None and self.like is None
