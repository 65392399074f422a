"""In which order the rows of a cell stay in the memory, for policies that know more of a row than its id.

Each order is a list of places, first those that stay longest. Rows come in an order that chance has made; where nothing
else decides, they stay in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

ORDERED = ("hard", "diverse", "forgotten", "ageing")
"""Policies that put the rows of a cell in order; of others chance decides."""

FROM_LOSSES = ("hard", "forgotten")
"""Policies that want the loss of every row."""

FROM_FEATURES = ("diverse",)
"""Policies that want the features of every row (`features.py`)."""

FENCE = 1.5
"""A loss is extreme when it is so many interquartile ranges above the upper quartile (Tukey 1977)."""


@dataclass(frozen=True)
class Known:
    """What is known of a row: its place in its cell's order, the number of the update it came with, and its losses.

    `learned` is the one it had once it was learned, `loss` the last that was measured, in nats; None: never measured.
    """

    rank: int
    update: int
    learned: float | None = None
    loss: float | None = None


def hardest(losses: Sequence[float]) -> list[int]:
    """The highest loss first, extreme ones (`FENCE`) last.

    Hard rows are worth keeping, but the hardest are often mislabelled: wrong labels are found by low confidence
    (Northcutt et al. 2021, arXiv:1911.00068).
    """
    lower, upper = np.quantile(losses, [0.25, 0.75])
    fence = upper + FENCE * (upper - lower)
    return sorted(range(len(losses)), key=lambda at: (losses[at] > fence, -losses[at]))


def most_forgotten(rises: Sequence[float]) -> list[int]:
    """The largest rise of loss first (after the forgetting events of Toneva et al. 2019, arXiv:1812.05159)."""
    return sorted(range(len(rises)), key=lambda at: -rises[at])


def newest(updates: Sequence[int]) -> list[int]:
    """The rows of the last update first, those of the oldest last."""
    return sorted(range(len(updates)), key=lambda at: -updates[at])


def herded(features: Tensor, stands_for: Sequence[float], count: int) -> list[int]:
    """The first `count` rows whose mean is, taken one by one, nearest to the mean of all; the rest follows.

    Herding (Welling 2009) as in iCaRL (Rebuffi et al. 2017, arXiv:1611.07725): the k-th row is
    argmin_x |mu - (x + x_1 + ... + x_{k-1}) / k| over `features` `[rows, hidden]`, each divided by its length.
    A row counts in mu for as many rows as it `stands_for`.
    """
    import torch

    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    weights = torch.tensor(stands_for, dtype=torch.double)
    mean = (weights / weights.sum()) @ unit
    left = torch.ones(len(unit), dtype=torch.bool)
    taken = torch.zeros_like(mean)
    order: list[int] = []
    while len(order) < min(count, len(unit)):
        # |k mu - taken - x|^2 less what is the same for all x; the x are of length 1.
        nearness = unit @ ((len(order) + 1) * mean - taken)
        at = int(nearness.masked_fill(~left, -math.inf).argmax())
        order.append(at)
        left[at] = False
        taken += unit[at]
    return [*order, *(at for at in range(len(unit)) if left[at])]
