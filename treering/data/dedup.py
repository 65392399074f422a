"""Exact duplicates and held-out leakage: what an incoming row is to the rows already stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Split = Literal["train", "held_out"]
Fate = Literal["new", "duplicate", "aside", "to_held_out", "already_trained"]


def fate(id: str, split: Split, stored: Mapping[str, Split | Literal["aside"]], trained: set[str]) -> Fate:
    """What to do with an incoming row.

    `stored` maps the ids already in the catalog to their split; `trained` holds the ids that a version has learned.
    A held-out row is held out everywhere: it is never stored for training, and a stored training row moves to the
    held-out side when a user's file names it, unless some version has already learned it. A row that was set aside
    (`aside`) after a hold stays so until the user names its file.
    """
    if id not in stored:
        return "already_trained" if split == "held_out" and id in trained else "new"
    if split == "train" and stored[id] == "aside":
        return "aside"
    if split == "train" or stored[id] == "held_out":
        return "duplicate"
    return "already_trained" if id in trained else "to_held_out"
