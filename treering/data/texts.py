"""Which of some texts another one is like: for a few that are compared in memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from treering.data.example import normalise

ALIKE = 0.8
"""Texts are alike when so much of what either has is in both."""


class Texts:
    """Texts, each of a kind, and which of them another text is like.

    Two are alike when they have the same normal form, or when the weighted Jaccard index of their sequences of three
    characters is `ALIKE` or more. A sequence weighs the less, the more of the texts have it: an instruction that all
    begin with tells nothing. `texts` (with their kinds) are there from the start and fix the weights.
    """

    def __init__(self, texts: Iterable[tuple[str, str]] = ()) -> None:
        self._having: Counter[str] = Counter()
        self._count = 0
        self._kept: list[tuple[str, str]] = []
        self._places: dict[str, list[int]] = {}
        for text, kind in texts:
            self.add(text, kind)
        self._having.update({three: len(places) for three, places in self._places.items()})
        self._count = len(self._kept)

    def add(self, text: str, kind: str) -> None:
        """One more."""
        for three in _threes(text):
            self._places.setdefault(three, []).append(len(self._kept))
        self._kept.append((text, kind))

    def like(self, text: str) -> str | None:
        """The kind of the text that came first of those that `text` is like; None: it is like none."""
        threes = _threes(text)
        ordered = sorted(threes, key=lambda three: (-self._weight(three), three))
        left = math.fsum(map(self._weight, ordered))
        least = ALIKE * left
        near: set[int] = set()
        for three in ordered:  # One that is like it has one of the heaviest: without them, too little is left to share.
            if left < least * (1 - 1e-9):
                break
            near.update(self._places.get(three, ()))
            left -= self._weight(three)
        return next((self._kept[at][1] for at in sorted(near) if self._alike(threes, _threes(self._kept[at][0]))), None)

    def _alike(self, one: set[str], other: set[str]) -> bool:
        shared, either = (math.fsum(map(self._weight, threes)) for threes in (one & other, one | other))
        return shared >= ALIKE * either

    def _weight(self, three: str) -> float:
        return math.log((self._count + 2) / (self._having[three] + 1))


def _threes(text: str) -> set[str]:
    """Its normal form's sequences of three characters, with a blank before and behind; of none the two blanks."""
    plain = f" {normalise(text)} "
    return {plain[at : at + 3] for at in range(max(1, len(plain) - 2))}
