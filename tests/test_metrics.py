"""Every measure against numbers worked out by hand, and what must hold for all matrices."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.metrics import (
    Matrix,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    negative_flips,
    new,
    old,
)

NAN = float("nan")
THREE = [[0.9, 0.3, 0.1], [0.7, 0.8, 0.2], [0.6, 0.85, 0.95]]
"""Three tasks, one an update. Row: after which update; column: on which task."""


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_three_tasks_by_hand() -> None:
    learned = [0, 1, 2]
    assert average_accuracy(THREE) == pytest.approx((0.6 + 0.85 + 0.95) / 3)
    assert new(THREE, learned) == pytest.approx((0.9 + 0.8 + 0.95) / 3)
    assert old(THREE) == pytest.approx((0.6 + 0.85) / 2)
    assert backward_transfer(THREE, learned) == pytest.approx(((0.6 - 0.9) + (0.85 - 0.8)) / 2)
    assert forgetting(THREE, learned) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.85)) / 2)
    assert forward_transfer(THREE, learned, [0.0, 0.1, 0.15]) == pytest.approx(((0.3 - 0.1) + (0.2 - 0.15)) / 2)


def test_forgetting_counts_from_the_best_score() -> None:
    R = [[0.5, 0.0], [0.9, 0.6], [0.7, 0.5]]
    assert forgetting(R, [0, 1]) == pytest.approx(((0.9 - 0.7) + (0.6 - 0.5)) / 2)
    assert backward_transfer(R, [0, 1]) == pytest.approx(((0.7 - 0.5) + (0.5 - 0.6)) / 2)
    # What the model could do before it was taught is no peak of what it learned.
    assert forgetting([[0.5, 1.0], [0.5, 0.6], [0.5, 0.6]], [0, 1]) == pytest.approx(0.0)


def test_tasks_taught_together_and_updates_that_teach_nothing_new() -> None:
    R = [[0.8, 0.6, NAN], [0.7, 0.6, NAN], [0.6, 0.5, 0.9]]
    learned = [0, 0, 2]
    assert new(R, learned) == pytest.approx((0.8 + 0.6 + 0.9) / 3)
    assert old(R) == pytest.approx((0.6 + 0.5) / 2)
    assert backward_transfer(R, learned) == pytest.approx((-0.2 - 0.1) / 2)
    assert old(R[:2]) == pytest.approx((0.7 + 0.6) / 2)


def test_one_task_has_no_past() -> None:
    assert average_accuracy([[0.7]]) == new([[0.7]], [0]) == 0.7
    for value in (old([[0.7]]), backward_transfer([[0.7]], [0]), forgetting([[0.7]], [0])):
        assert math.isnan(value)
    assert math.isnan(forward_transfer([[0.7]], [0], [0.1]))


def test_what_was_not_measured_is_left_out() -> None:
    R = [[0.9, NAN, NAN], [0.8, NAN, NAN], [0.7, 0.6, NAN]]
    learned = [0, 1, 2]
    assert average_accuracy(R) == pytest.approx(0.65)
    assert new(R, learned) == pytest.approx(0.9)
    assert old(R) == pytest.approx(0.65)
    assert forgetting(R, learned) == pytest.approx(0.2)
    assert backward_transfer(R, learned) == pytest.approx(-0.2)
    assert math.isnan(average_accuracy([[NAN, NAN]]))
    assert math.isnan(forgetting([[NAN], [NAN]], [0]))
    assert math.isnan(forward_transfer(R, learned, [0.1, 0.1, 0.1]))


matrices = st.integers(1, 5).flatmap(
    lambda tasks: st.lists(st.lists(st.floats(0, 1), min_size=tasks, max_size=tasks), min_size=tasks, max_size=tasks)
)


@given(matrices)
def test_what_holds_for_all_matrices(R: list[list[float]]) -> None:
    learned = list(range(len(R)))
    assert 0 <= average_accuracy(R) <= 1
    assert 0 <= new(R, learned) <= 1
    if len(R) > 1:
        # The best score is at least the first, so forgetting is at least the loss since then.
        assert forgetting(R, learned) >= -backward_transfer(R, learned) - 1e-12
        assert -1 <= backward_transfer(R, learned) <= 1
        assert forward_transfer(R, learned, [0.0] * len(R)) >= 0
    constant = np.tile(np.asarray(R)[0], (len(R), 1))
    if len(R) > 1:
        assert forgetting(constant, learned) == pytest.approx(0.0, abs=1e-12)
        assert backward_transfer(constant, learned) == pytest.approx(0.0, abs=1e-12)
    assert new(constant, learned) == pytest.approx(average_accuracy(constant))


def test_negative_flips_by_hand() -> None:
    before = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0, "only before": 1.0}
    after = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.5, "only after": 0.0}
    assert negative_flips(before, after) == pytest.approx(2 / 4)
    assert negative_flips({"a": 0.5}, {"a": 0.0}) == 0.0
    assert math.isnan(negative_flips({}, after))


def test_the_matrix_grows() -> None:
    empty = Matrix([], [], [])
    assert empty.summary() == {}
    first = empty.extended({"pens": 0.1}, {"pens": 0.9}, ["pens"])
    assert first == Matrix(["pens"], [0], [[0.9]])
    second = first.extended({"pens": 0.9, "cups": 0.2}, {"pens": 0.8, "cups": 0.7}, ["cups"])
    assert second == Matrix(["pens", "cups"], [0, 1], [[0.9, 0.2], [0.8, 0.7]])
    third = second.extended({"pens": 0.8, "cups": 0.7}, {"pens": 0.85, "cups": 0.7}, ["pens"])
    assert third == Matrix(["pens", "cups"], [0, 1], [[0.9, 0.2], [0.8, 0.7], [0.85, 0.7]])
    fourth = third.extended({}, {"pens": 0.8, "cups": 0.6}, ["hats", "mugs"])
    assert fourth.tasks == ["pens", "cups", "hats", "mugs"]
    assert fourth.learned == [0, 1, 3, 3]
    assert fourth.R == [
        [0.9, 0.2, None, None],
        [0.8, 0.7, None, None],
        [0.85, 0.7, None, None],
        [0.8, 0.6, None, None],
    ]
    assert first == Matrix(["pens"], [0], [[0.9]])


def test_after_an_adopted_version() -> None:
    """v1 that was adopted has no scores; what it scored on the first new task is measured when that is taught."""
    found = Matrix([], [], [[]]).extended({"pens": 0.3}, {"pens": 0.9}, ["pens"])
    assert found == Matrix(["pens"], [1], [[0.3], [0.9]])
    assert forward_transfer(np.asarray(found.R, dtype=float), found.learned, [0.1]) == pytest.approx(0.2)


def test_a_summary_holds_what_is_defined() -> None:
    assert Matrix(["pens"], [0], [[0.9]]).summary() == {
        "average_accuracy": 0.9,
        "new": 0.9,
        "old": None,
        "bwt": None,
        "forgetting": None,
    }
    assert Matrix(["pens"], [0], [[None]]).summary()["average_accuracy"] is None
    assert Matrix(["pens", "cups"], [0, 1], [[None, None], [None, 0.5]]).summary()["forgetting"] is None
    summary = Matrix(["pens", "cups", "hats"], [0, 1, 2], [list(row) for row in THREE]).summary()
    assert summary["bwt"] == pytest.approx(-0.125)
    assert summary["forgetting"] == pytest.approx(0.125)
