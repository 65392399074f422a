"""What only the labels of a task's rows together show: rare ones that look like a slip of another, and imbalance."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from treering.data.example import Example, normalise
from treering.scoring import metric_for

FEW, MUCH = 0.1, 10.0
"""A label with less than this share of the mean of all is rare; the most frequent one has so many times the rarest: the
task is out of balance."""

ALIKE, MOST = 0.85, 500
"""Likeness of two labels (Ratcliff and Obershelp) from which on the rarer one may be a slip; more labels than so
many are not compared."""


@dataclass(frozen=True)
class Labels:
    """How often each answer is given in a task, as it is written and normalised; both empty where answers are open."""

    written: Mapping[str, int]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, rows: Collection[Example]) -> Labels:
        """Those of a task with these rows."""
        if metric_for(rows) != "exact_match":
            return cls({}, {})
        written = Counter(row.answer for row in rows)
        by_label: Counter[str] = Counter()
        for answer, count in written.items():
            by_label[normalise(answer)] += count
        return cls(written, by_label)

    def slips(self) -> dict[str, str]:
        """Rare answers that look like a frequent one: `Refunds` beside many of `refund`."""
        if len(self.written) > MOST:
            return {}
        mean = sum(self.counts.values()) / max(1, len(self.counts))
        by_count = sorted(self.written, key=lambda answer: (self.written[answer], answer))
        frequent = {normalise(answer): answer for answer in by_count if self.written[answer] >= FEW * mean}
        found = {}
        for answer in by_count:
            near = difflib.get_close_matches(normalise(answer), frequent, 1, ALIKE)
            if near and self.written[answer] < FEW * min(mean, self.written[frequent[near[0]]]):
                found[answer] = frequent[near[0]]
        return dict(sorted(found.items()))

    def imbalance(self) -> float | None:
        """The count of the most frequent label over that of the rarest, if that is much."""
        if not self.counts:
            return None
        ratio = max(self.counts.values()) / min(self.counts.values())
        return ratio if ratio >= MUCH else None
