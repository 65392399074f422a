"""Measures of continual learning, as pure functions of the score matrix.

`R` is a float array `[updates, tasks]`: `R[i][j]` is the score on task j after update i, NaN where nothing was
measured. `learned[j]` is the update that first taught task j. Scores and results are fractions between 0 and 1.
Every function returns NaN where it is not defined (a single task has no forgetting).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]


def average_accuracy(R: ArrayLike) -> float:
    """Mean of the last row: `1/T sum_j R[T][j]` (Lopez-Paz and Ranzato 2017, ACC)."""
    return _mean(_last(R))


def new(R: ArrayLike, learned: Sequence[int]) -> float:
    """How well tasks were learned when they were new: mean of `R[learned[j]][j]`."""
    return _mean(_when_learned(R, learned))


def old(R: ArrayLike) -> float:
    """Mean of the last row over all tasks but the last one learned (the last column)."""
    return _mean(_last(R)[:-1])


def backward_transfer(R: ArrayLike, learned: Sequence[int]) -> float:
    """BWT: mean of `R[T][j] - R[learned[j]][j]` over earlier tasks (Lopez-Paz and Ranzato 2017); forgetting is < 0."""
    R = np.asarray(R, dtype=float)
    return _mean((_last(R) - _when_learned(R, learned))[_earlier(R, learned)])


def forgetting(R: ArrayLike, learned: Sequence[int]) -> float:
    """Mean of `max_{i<T} R[i][j] - R[T][j]` over earlier tasks (Chaudhry et al. 2018), i from `learned[j]` on."""
    R = np.asarray(R, dtype=float)
    drops = [np.fmax.reduce(R[learned[j] : -1, j]) - R[-1, j] for j in _earlier(R, learned)]
    return _mean(np.asarray(drops))


def forward_transfer(R: ArrayLike, learned: Sequence[int], baseline: ArrayLike) -> float:
    """FWT: mean of `R[learned[j]-1][j] - baseline[j]` over the tasks after the first (Lopez-Paz and Ranzato 2017).

    `R[learned[j]-1][j]` is the parent's score on the task before it was taught; `baseline[j]` the untouched model's.
    """
    R, baseline = np.asarray(R, dtype=float), np.asarray(baseline, dtype=float)
    later = [j for j, update in enumerate(learned) if update > 0]
    return _mean(np.asarray([R[learned[j] - 1, j] - baseline[j] for j in later]))


def negative_flips(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Share of the rows scored both times that were right (score 1) before and are not after (Yan et al. 2021)."""
    both = [(before[row], after[row]) for row in before if row in after]
    return _mean(np.asarray([float(was == 1 and now < 1) for was, now in both]))


@dataclass(frozen=True)
class Matrix:
    """`R` with the names of its tasks and `learned`, as a version keeps it; None stands for NaN."""

    tasks: list[str]
    learned: list[int]
    R: list[list[float | None]]

    def extended(self, before: Mapping[str, float], after: Mapping[str, float], taught: Iterable[str]) -> Matrix:
        """With one more update: its scores `after`, and the parent's scores `before` on tasks it had not learned."""
        added = [task for task in taught if task not in self.tasks]
        tasks = self.tasks + added
        rows = [[*row, *[None] * len(added)] for row in self.R]
        if rows:
            rows[-1][len(self.tasks) :] = [before.get(task) for task in added]
        rows.append([after.get(task) for task in tasks])
        return Matrix(tasks, self.learned + [len(self.R)] * len(added), rows)

    def summary(self) -> dict[str, float | None]:
        """The measures of this matrix, None where one is not defined."""
        if not self.tasks:
            return {}
        R = np.asarray(self.R, dtype=float)
        found = {
            "average_accuracy": average_accuracy(R),
            "new": new(R, self.learned),
            "old": old(R),
            "bwt": backward_transfer(R, self.learned),
            "forgetting": forgetting(R, self.learned),
        }
        return {name: None if np.isnan(value) else value for name, value in found.items()}


def _mean(values: ArrayLike) -> float:
    found = np.asarray(values, dtype=float)
    found = found[~np.isnan(found)]
    return float(found.mean()) if len(found) else float("nan")


def _last(R: ArrayLike) -> Vector:
    last: Vector = np.asarray(R, dtype=float)[-1]
    return last


def _when_learned(R: ArrayLike, learned: Sequence[int]) -> Vector:
    R = np.asarray(R, dtype=float)
    return np.asarray([R[update, j] for j, update in enumerate(learned)])


def _earlier(R: NDArray[np.float64], learned: Sequence[int]) -> list[int]:
    return [j for j, update in enumerate(learned) if update < len(R) - 1]
