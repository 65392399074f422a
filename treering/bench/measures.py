"""What runs come to: measures of each, their mean and spread, and paired intervals over rows and runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treering import metrics

Figures = Mapping[str, Any]
"""What a run leaves (`runs.py`)."""

Floats = NDArray[np.float64]

NAMES = ("average_accuracy", "new", "old", "bwt", "fwt", "forgetting", "negative_flips")

BY_ROW = ("average_accuracy", "new", "old")
"""Measures that are means over tasks of means over rows; these have intervals."""

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Run:
    """One run of a method: its seed, its order (`tasks` as first taught in it), and what it left."""

    seed: int
    order: int
    tasks: tuple[str, ...]
    figures: Figures


def measures(run: Run, untouched: Figures | None) -> dict[str, float | None]:
    """All of `NAMES`, None where one is not defined. FWT needs the figures of the untouched model."""
    figures, learned = run.figures, run.figures["learned"]
    at = {task: number for number, task in enumerate(figures["tasks"])}
    # Columns in the order of this run, whatever order they were measured in: `old` leaves out the last.
    columns = [at[task] for task in run.tasks]
    R = np.asarray(figures["matrix"], dtype=float)[:, columns]
    found = {"average_accuracy": metrics.average_accuracy(R), "old": metrics.old(R)}
    if learned is not None:
        when = [learned[column] for column in columns]
        found |= {
            "new": metrics.new(R, when),
            "bwt": metrics.backward_transfer(R, when),
            "forgetting": metrics.forgetting(R, when),
        }
        if untouched is not None:
            before = dict(zip(untouched["tasks"], untouched["matrix"][0], strict=True))
            found["fwt"] = metrics.forward_transfer(R, when, [before[task] for task in run.tasks])
    flips = figures["negative_flips"]
    found["negative_flips"] = math.nan if flips is None else flips
    return {name: None if math.isnan(found.get(name, math.nan)) else found[name] for name in NAMES}


def spread(values: Sequence[tuple[int, float]]) -> float | None:
    """Standard deviation between seeds, from (order, value): inside each order, then pooled. None with one seed."""
    orders: dict[int, list[float]] = {}
    for order, value in values:
        orders.setdefault(order, []).append(value)
    if min(map(len, orders.values()), default=0) < 2:
        return None
    return math.sqrt(fmean(variance(found) for found in orders.values()))


def interval(name: str, runs: Sequence[Run], baseline: Sequence[Run] | None = None) -> tuple[float, float, float]:
    """Mean of the measure `name` (of `BY_ROW`) over `runs` with its bootstrap interval: mean, low, high.

    With `baseline`, of the paired difference to it: runs by seed and order, rows by id. Runs are drawn with
    replacement, and rows inside each task, the same rows for all runs; so rows and seeds both count as chance.
    """
    theirs = {(run.seed, run.order): run for run in baseline or ()}
    pairs = [(run, theirs.get((run.seed, run.order))) for run in runs]
    if baseline is not None:
        pairs = [(run, other) for run, other in pairs if other is not None]
    scored = [[_scores(name, run) for run in pair if run is not None] for pair in pairs]
    common = set.intersection(*(set(found) for pair in scored for found in pair))
    rows = sorted(common)
    values = np.array([[pair[0][row] - (pair[1][row] if len(pair) > 1 else 0.0) for row in rows] for pair in scored])
    weighted = values * np.array([_weights(name, run, rows) for run, _ in pairs])
    draw = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    tasks = [task for task, _ in rows]
    starts = [at for at, task in enumerate(tasks) if at == 0 or tasks[at - 1] != task]
    sizes = np.diff([*starts, len(tasks)])
    for number in range(RESAMPLES):
        picked = np.concatenate(
            [start + draw.integers(0, size, size) for start, size in zip(starts, sizes, strict=True)]
        )
        chosen = draw.integers(0, len(pairs), len(pairs))
        means[number] = weighted[chosen].mean(axis=0)[picked].sum()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(weighted.sum(axis=1).mean()), float(low), float(high)


def difference(name: str, runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any]:
    """How far `runs` are from `baseline`: `mean`, `low`, `high`, `spread` (the larger of both) and the `verdict`.

    It is `no difference` unless the mean is larger than the spread between seeds and the interval leaves out zero;
    with one seed there is no spread to compare with, and nothing is said.
    """
    mean, low, high = interval(name, runs, baseline)
    spreads = [spread([(run.order, measures(run, None)[name] or 0.0) for run in side]) for side in (runs, baseline)]
    known = [found for found in spreads if found is not None]
    largest = max(known) if len(known) == 2 else None
    return {"mean": mean, "low": low, "high": high, "spread": largest, "verdict": _verdict(mean, low, high, largest)}


def _verdict(mean: float, low: float, high: float, spread: float | None) -> str:
    if spread is None:
        return "not judged: one seed"
    if abs(mean) <= spread or low <= 0 <= high:
        return "no difference"
    return "better" if mean > 0 else "worse"


def defined(name: str, runs: Sequence[Run]) -> bool:
    """Whether every run has a score for each row of the measure."""
    return all(_side(name, run) is not None for run in runs) and (name != "old" or len(runs[0].tasks) > 1)


def _side(name: str, run: Run) -> Mapping[str, Mapping[str, float]] | None:
    found: Mapping[str, Mapping[str, float]] | None = run.figures["first" if name == "new" else "final"]
    return found


def _scores(name: str, run: Run) -> dict[tuple[str, str], float]:
    side = _side(name, run)
    assert side is not None
    return {(task, id): score for task, rows in side.items() for id, score in rows.items()}


def _weights(name: str, run: Run, rows: Sequence[tuple[str, str]]) -> list[float]:
    """What each row counts: tasks alike, and rows inside a task."""
    counted = run.tasks[:-1] if name == "old" else run.tasks
    sizes = {task: sum(1 for other, _ in rows if other == task) for task in counted}
    return [1 / len(counted) / sizes[task] if task in sizes else 0.0 for task, _ in rows]


def summarised(values: Sequence[float | None], how: Callable[[Sequence[float]], float] = fmean) -> float | None:
    """`how` of the values that there are, or None."""
    found = [value for value in values if value is not None]
    return how(found) if found else None
