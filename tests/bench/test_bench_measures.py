"""Measures of runs: columns, spread between seeds, paired intervals, and what counts as a difference."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from treering.bench.measures import Run, difference, interval, measures, spread

TASKS = ("a", "b")


def run(seed: int, scores: dict[str, list[float]], order: int = 0, tasks: tuple[str, ...] = TASKS) -> Run:
    """A run whose rows scored so at the end, and the same when they were learned."""
    rows = {task: {f"{task}{at}": score for at, score in enumerate(found)} for task, found in scores.items()}
    names = list(scores)
    last = [statistics.fmean(scores[task]) for task in names]
    figures = {
        "tasks": names,
        "learned": list(range(len(names))),
        "matrix": [[None if at > number else last[at] for at in range(len(names))] for number in range(len(names))],
        "final": rows,
        "first": rows,
        "negative_flips": 0.25,
    }
    return Run(seed, order, tasks, figures)


def drawn(seed: int, right: float, rows: int = 200) -> Run:
    """Each row right with that chance."""
    draw = np.random.default_rng(seed)
    return run(seed, {task: [float(draw.random() < right) for _ in range(rows)] for task in TASKS})


def test_columns_are_taken_in_the_order_of_the_run() -> None:
    scores = {"a": [1.0, 1.0], "b": [0.0, 1.0]}
    assert measures(run(1, scores), None)["old"] == 1.0
    found = measures(run(1, scores, tasks=("b", "a")), None)
    assert (found["old"], found["average_accuracy"], found["negative_flips"]) == (0.5, 0.75, 0.25)
    assert found["fwt"] is None


def test_an_untouched_model_has_no_new_tasks() -> None:
    one = run(1, {"a": [1.0], "b": [0.0]})
    bare = Run(1, 0, TASKS, {**one.figures, "learned": None, "first": None, "matrix": [[1.0, 0.0]]})
    found = measures(bare, bare.figures)
    assert found["new"] is None and found["bwt"] is None and found["average_accuracy"] == 0.5


def test_spread_is_that_between_seeds_inside_each_order() -> None:
    # Far apart between the orders, which are not chance; 2 and 4 apart between the seeds.
    assert spread([(0, 1.0), (0, 3.0), (1, 100.0), (1, 104.0)]) == pytest.approx(math.sqrt((2 + 8) / 2))
    assert spread([(0, 1.0), (1, 3.0)]) is None


def test_the_interval_is_that_of_all_resamples() -> None:
    """A case small enough to count every resample: one task of three rows, two runs."""
    values = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]
    runs = [run(seed, {"a": row}, tasks=("a",)) for seed, row in enumerate(values)]
    mean, low, high = interval("average_accuracy", runs)
    every = [
        statistics.fmean(values[r][c] for r in rows for c in columns)
        for rows in itertools.product(range(2), repeat=2)
        for columns in itertools.product(range(3), repeat=3)
    ]
    assert mean == pytest.approx(2.5 / 6)
    assert (low, high) == pytest.approx(tuple(np.quantile(every, [0.025, 0.975])), abs=0.06)


def test_pairing_sees_what_two_intervals_hide() -> None:
    """The same rows right but for a few that one method has besides: apart by pairs, not by intervals alone."""
    theirs = [drawn(seed, 0.5) for seed in (1, 2, 3)]
    ours = []
    for one in theirs:
        final = {task: dict(rows) for task, rows in one.figures["final"].items()}
        for rows in final.values():
            for id in [id for id, score in rows.items() if score == 0][:8]:
                rows[id] = 1.0
        ours.append(Run(one.seed, one.order, one.tasks, {**one.figures, "final": final}))
    mean, low, high = interval("average_accuracy", ours, theirs)
    assert mean == pytest.approx(8 / 200) and 0 < low < mean < high
    assert interval("average_accuracy", ours)[1] < interval("average_accuracy", theirs)[2]


def test_a_difference_within_the_spread_between_seeds_is_none() -> None:
    one = {"a": [1.0] * 60 + [0.0] * 40, "b": [1.0] * 60 + [0.0] * 40}
    other = {"a": [1.0] * 90 + [0.0] * 10, "b": [1.0] * 90 + [0.0] * 10}
    better = {"a": [1.0] * 75 + [0.0] * 25, "b": [1.0] * 75 + [0.0] * 25}
    # 60 and 90 between seeds: a spread of 21 points, so that 15 points more with each seed are no difference ...
    wide = [run(1, one), run(2, other)]
    above = [run(1, better), run(2, {task: [1.0] * 100 for task in TASKS})]
    found = difference("average_accuracy", above, wide)
    assert found["low"] > 0 and found["mean"] == pytest.approx(0.125) and found["spread"] > 0.2
    assert found["verdict"] == "no difference"
    # ... but they are one where seeds agree.
    assert difference("average_accuracy", [run(1, better), run(2, better)], [run(1, one), run(2, one)])["verdict"] == (
        "better"
    )
    assert difference("average_accuracy", [run(1, one), run(2, one)], [run(1, better), run(2, better)])["verdict"] == (
        "worse"
    )
    assert difference("average_accuracy", [run(1, better)], [run(1, one)])["verdict"] == "not judged: one seed"


def test_old_leaves_out_the_last_task_of_each_order() -> None:
    runs = [run(1, {"a": [1.0], "b": [0.0]}), run(1, {"a": [1.0], "b": [0.0]}, order=1, tasks=("b", "a"))]
    assert interval("old", runs)[0] == pytest.approx(0.5)
    assert interval("old", runs[:1])[0] == 1.0
