"""`learning_rate: tuned`: a baseline at its best rate, found on training rows alone; the cost is counted apart."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from treering.bench.entries import Entry
from treering.bench.runs import Job, run_all
from treering.bench.stream import Draw, Update
from treering.errors import TreeringError, UpdateInterruptedError
from treering.progress import say

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""The grid, around the default rate of the `finetuning_type`."""

UPDATES = 2
"""So many updates are tried: the second shows what a rate forgets."""

HELD_BACK = 0.2
"""Share of each task's training rows that judges the rates; they are not learned while it does."""


def tune(entry: Entry, draw: Draw, settings: Callable[[Entry], dict[str, Any]], work: Path) -> dict[str, Any]:
    """The best rate: highest average accuracy on the rows held back, after the first updates; then the lowest loss.

    Returns `rate`, all that were `tried`, whether it lies at the `edge` of the grid, and what it cost. A rate whose
    training fails is out; `TreeringError` if all are.
    """
    small = held_back(draw)
    default = settings(entry)["learning_rate"]
    tried: list[dict[str, Any]] = []
    for rate in sorted(default * factor for factor in FACTORS):
        job = Job.of(f"{entry.name} at {rate:g}", entry.kind, settings(entry.at(rate)), small)
        try:
            (found,) = run_all([job], work)
        except UpdateInterruptedError:
            raise
        except TreeringError as error:
            say(f"{entry.name} at {rate:g}: {error}")
            continue
        score = math.fsum(found["matrix"][-1]) / len(found["tasks"])
        tried.append({"rate": rate, "score": score, "loss": found["loss"], **_cost(found)})
    if not tried:
        raise TreeringError(f"method {entry.name} failed at every rate from {default * FACTORS[0]:g} up; see above")
    best = max(tried, key=lambda one: (one["score"], -one["loss"]))["rate"]
    return {
        "rate": best,
        "edge": best in (default * FACTORS[0], default * FACTORS[-1]),
        "tried": [{key: one[key] for key in ("rate", "score", "loss")} for one in tried],
        **{key: sum(one[key] for one in tried) for key in ("seconds", "rows_trained")},
    }


def held_back(draw: Draw) -> Draw:
    """The first updates of `draw`, judged on a part of their training rows; its test rows are not in it."""
    updates: list[Update] = []
    test: Update = {}
    for update in draw.updates[:UPDATES]:
        learned: Update = {}
        for task, rows in update.items():
            order = sorted(rows, key=lambda row: row.id)
            random.Random(f"tuning:{task}").shuffle(order)
            count = max(1, round(HELD_BACK * len(order)))
            test.setdefault(task, []).extend(order[:count])
            learned[task] = order[count:]
        updates.append(learned)
    return Draw(updates, test)


def _cost(found: dict[str, Any]) -> dict[str, float]:
    return {key: found["cost"][key] for key in ("seconds", "rows_trained")}


def words(found: dict[str, Any]) -> str:
    """What was tried, and what was taken."""
    tried: Sequence[dict[str, Any]] = found["tried"]
    each = ", ".join(f"{one['rate']:g}: {100 * one['score']:.1f}" for one in tried)
    edge = "; the best lies at the edge of the grid" if found["edge"] else ""
    return f"{found['rate']:g} (of {each} on training rows held back{edge})"
