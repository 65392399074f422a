"""How far the words of new rows are from those learned: known before training, and without the model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from treering.data.catalog import Catalog
    from treering.data.example import Example

_WORD = re.compile(r"\w+|[^\w\s]")
_MOST = 10_000
"""Rows of each side that are read; ids are hashes, so those that come first by id are a random draw."""
_DRAWS = 5


def drift(catalog: Catalog, waiting: Sequence[str], learned: Sequence[str]) -> float:
    """Bits between the user's words in `waiting` and in `learned` rows, less what a random draw of `learned` has.

    The Jensen-Shannon divergence (J. Lin, Divergence measures based on the Shannon entropy, IEEE Transactions on
    Information Theory 37, 1991) with equal weights and base 2: 0 for the same words equally often, 1 for no word in
    common. A few rows always seem far from many, so draws of learned rows, as large as the new ones, are measured as
    well, and the mean of theirs is taken off. 1 while nothing was learned.
    """
    if not learned:
        return 1.0
    new, old = ([words(e) for e in catalog.examples(sorted(ids)[:_MOST]).values()] for ids in (waiting, learned))
    size = min(len(new), len(old) // 2)
    draws = [old[n * size : (n + 1) * size] for n in range(_DRAWS) if (n + 1) * size <= len(old)] if size else []
    everything = _total(old)
    chance = [divergence(_total(draw), everything - _total(draw)) for draw in draws]
    found = divergence(_total(new), everything)
    return max(0.0, found - (sum(chance) / len(chance) if chance else 0.0))


def divergence(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Jensen-Shannon divergence of two counts, in bits."""
    a, b = sum(first.values()), sum(second.values())
    if not a or not b:
        return 0.0 if a == b else 1.0
    bits = 0.0
    for word in {**first, **second}:
        p, q = first.get(word, 0) / a, second.get(word, 0) / b
        middle = (p + q) / 2
        bits += sum(share * math.log2(share / middle) / 2 for share in (p, q) if share)
    return min(1.0, max(0.0, bits))


def words(example: Example) -> Counter[str]:
    """The words of the user's turns, and how often each is there."""
    return Counter(word for m in example.messages if m.role == "user" for word in _WORD.findall(m.content.casefold()))


def _total(rows: Sequence[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row)
    return total
