"""The router is a linear discriminant of all rows ever shown, and knows what is far from all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from treering.router import ANYTHING, NOBODY, REMEMBERED, SHRINKAGE, Router, Shown, Spread

SIZE = 6


def rows(count: int, centre: float, seed: int, spread: float = 1.0) -> Tensor:
    drawn = torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.tensor([spread, 1.0, 0.2, 1.0, 3.0, 1.0]) + centre


@pytest.fixture
def taught() -> Router:
    router = Router(SIZE)
    router.learn(Shown(torch.cat([rows(40, 0, 1), rows(30, 5, 2)]), ["a"] * 40 + ["b"] * 30), {"a": "e1", "b": "e1"})
    router.learn(Shown(rows(50, -5, 3), ["c"] * 50), {"c": "e2"})
    return router


def test_it_is_fishers_discriminant(taught: Router) -> None:
    parts = {"a": rows(40, 0, 1), "b": rows(30, 5, 2), "c": rows(50, -5, 3)}
    arrays = {name: part.double().numpy() for name, part in parts.items()}
    means = np.stack([part.mean(0) for part in arrays.values()])
    scatter = sum((part - part.mean(0)).T @ (part - part.mean(0)) for part in arrays.values()) / 120
    shrunk = (1 - SHRINKAGE) * scatter + SHRINKAGE * np.trace(scatter) / SIZE * np.eye(SIZE)
    asked = rows(20, 1, 9)
    off = asked.double().numpy()[:, None] - means
    distances = np.einsum("rci,ij,rcj->rc", off, np.linalg.inv(shrunk), off)
    experts, logs = taught.nearest(asked)
    assert experts == [["e1", "e1", "e2"][at] for at in distances.argmin(1)]
    np.testing.assert_allclose(logs.numpy(), np.log(distances.min(1)), rtol=1e-6)


def test_rows_may_come_in_any_order_and_in_parts() -> None:
    one, other = Router(SIZE), Router(SIZE)
    a, b = rows(20, 0, 1), rows(20, 4, 2)
    one.learn(Shown(torch.cat([a, b]), ["a"] * 20 + ["b"] * 20), {"a": "e1", "b": "e1"})
    other.learn(Shown(b[:7], ["b"] * 7), {"b": "e1"})
    other.learn(Shown(torch.cat([a, b[7:]]).flip(0), ["b"] * 13 + ["a"] * 20), {"a": "e1", "b": "e1"})
    asked = rows(30, 2, 5)
    torch.testing.assert_close(one.nearest(asked)[1], other.nearest(asked)[1])


def test_near_rows_get_an_expert_and_far_ones_none(taught: Router) -> None:
    near = taught.route(torch.cat([rows(50, 0, 11), rows(50, 5, 12)]))
    assert set(near) <= {"e1", None} and near.count(None) <= 5  # 2.3% of what is drawn from a normal distribution.
    assert set(taught.route(rows(50, -5, 13))) == {"e2"}
    assert set(taught.route(rows(50, 60, 14))) == {None}
    assert taught.route(rows(0, 0, 1)) == []


def test_what_is_likest_to_prompts_about_anything_gets_none() -> None:
    router = Router(SIZE)
    some = Shown(torch.cat([rows(40, 0, 1), rows(30, 5, 2)]), ["t\na"] * 40 + ["u\nb"] * 30)
    router.learn(replace(some, anything=rows(40, 2.5, 3), forms=("",)), {"t\na": "e1", "u\nb": "e2"})
    assert router.forms == [""] and not router.mistaken
    asked = torch.cat([rows(50, 0, 11), rows(50, 5, 12), rows(50, 2.5, 13)])
    found = router.route(asked)
    assert found[:50].count("e1") > 45 and found[50:100].count("e2") > 45 and found[100:].count(None) > 45
    # Who is nearest of those that learned something is another question.
    assert set(router.nearest(asked)[0]) == {"e1", "e2"}
    assert router.novelty(rows(50, 2.5, 31), ["v\nc"] * 50) > 0.5


def test_rows_that_are_about_anything_are_not_lost_to_it() -> None:
    router = Router(SIZE)
    some = Shown(torch.cat([rows(100, 0, 1), rows(20, 5, 2)]), ["t\na"] * 100 + ["u\n"] * 20)
    router.learn(replace(some, anything=rows(40, 5, 3), forms=("",)), {"t\na": "e1", "u\n": "e1"})
    assert router.mistaken == ["u"]  # Half of the small task, less than a tenth of all rows.
    assert set(router.route(rows(50, 5, 12))) == {"e1"}
    assert not any(chances.get(ANYTHING) for chances in router.like(rows(5, 5, 12), 1.0, 3))


def test_a_task_of_few_rows_is_not_far_for_another_lies_closer() -> None:
    """Its means say little: its rows lie farther from them than those of the other task from theirs."""
    size, draw = 200, torch.Generator().manual_seed(7)
    router = Router(size)
    router.learn(Shown(0.5 * torch.randn(300, size, generator=draw), ["t\na"] * 300), {"t\na": "e1"})
    new = torch.randn(64, size, generator=draw) + 1.5
    names = [f"u\n{at % 8}" for at in range(24)]
    router.learn(Shown(new[:24], names), dict.fromkeys(names, "e1"))
    assert router.spread["t"].far < router.spread["u"].far
    assert router.route(new[24:]).count(None) <= 2
    assert set(router.route(new + 100)) == {None}


def test_what_it_was_shown_is_kept(tmp_path: Path) -> None:
    router = Router(SIZE)
    some = Shown(rows(40, 0, 1), ["t\na"] * 40, {"t\na": "A"}, rows(40, 9, 3), ("", "f00"))
    router.learn(some, {"t\na": ""})
    router.save(tmp_path)
    found = Router.load(tmp_path)
    assert (found.expert, found.forms, found.mistaken, found.whole, found.known, found.answers) == (
        {ANYTHING: NOBODY, "t\na": ""},
        ["", "f00"],
        [],
        True,
        router.known,
        {"t\na": "A"},
    )


def test_a_class_belongs_to_who_learned_it_last(taught: Router) -> None:
    taught.learn(Shown(rows(10, -5, 21), ["c"] * 10), {"c": "e1"})
    assert set(taught.route(rows(50, -5, 13))) == {"e1"}


def test_what_is_unlike_is_novel(taught: Router) -> None:
    before = dict(taught.expert)
    assert taught.novelty(rows(100, 12, 32), ["d"] * 100) == 1
    assert taught.novelty(rows(100, 5, 31), ["d"] * 100) < 0.7
    half = torch.cat([rows(50, 12, 32), rows(50, 5, 31)])
    assert 0.5 < taught.novelty(half, ["d"] * 50 + ["e"] * 50) < 0.9
    assert taught.expert == before


def test_distances_are_those_of_rows_that_were_not_learned() -> None:
    """Few rows in many dimensions lie near to the mean that they made themselves."""
    router = Router(SIZE)
    few = rows(12, 0, 41)
    router.learn(Shown(few, ["a"] * 12), {"a": "e1"})
    unseen = router.nearest(rows(400, 0, 42))[1]
    assert abs(router.spread["a"].mean - unseen.mean()) < abs(float(router.nearest(few)[1].mean()) - unseen.mean())


def test_many_new_distances_count_as_much_as_all_before_and_few_less() -> None:
    for count, weight in ((1000, 400), (2, REMEMBERED)):
        old, new = torch.full((1000,), 4.0), torch.linspace(1.0, 3.0, count)
        new = new[:400] if count == 1000 else new
        known = Spread().with_new(old).with_new(new)
        same = torch.cat([torch.full((weight,), 4.0), new])
        assert known.mean == pytest.approx(float(same.mean()))
        assert known.variance == pytest.approx(float(same.var(correction=0)))
        assert known.rows == 1000 + len(new)
    assert Spread().with_new(torch.empty(0)) == Spread()


def test_one_row_is_a_beginning() -> None:
    router = Router(SIZE)
    router.learn(Shown(rows(1, 0, 1), ["a"]), {"a": "e1"})
    assert router.route(rows(1, 0, 1)) == ["e1"]


def test_it_comes_back_as_it_was_kept(taught: Router, tmp_path: Path) -> None:
    taught.save(tmp_path)
    found = Router.load(tmp_path)
    asked = rows(30, 2, 5)
    assert found.nearest(asked)[0] == taught.nearest(asked)[0]
    assert torch.equal(found.nearest(asked)[1], taught.nearest(asked)[1])
    assert (found.known, found.spread) == (taught.known, taught.spread)


def test_few_new_rows_do_not_change_what_is_far(taught: Router) -> None:
    far = rows(50, 60, 14)
    taught.learn(Shown(rows(300, 0, 51), ["a"] * 300), {"a": "e1"})
    before = taught.spread["a"]
    for seed in range(5):
        taught.learn(Shown(rows(2, 0, 60 + seed), ["a"] * 2), {"a": "e1"})
    assert taught.spread["a"].rows == before.rows + 10
    assert taught.spread["a"].mean == pytest.approx(before.mean, abs=0.2)
    assert set(taught.route(far)) == {None}


def test_only_rows_of_known_labels_say_how_sharp_chances_are() -> None:
    router = Router(SIZE)
    names = ["a", "b"] * 30
    router.learn(Shown(rows(60, 0, 71), names, {"a": "A", "b": "B"}), dict.fromkeys("ab", ""))
    before = router.known
    assert before.labelled == 60 and before.sharpness < 0.5  # They cannot be told apart.
    single = [f"n{at}" for at in range(12)]
    router.learn(Shown(rows(12, 30, 72), single, {name: name for name in single}), dict.fromkeys(single, ""))
    router.learn(Shown(rows(100, -50, 73), ["open"] * 100), {"open": ""})
    assert (router.known.labelled, router.known.sharpness) == (60, before.sharpness)


def test_what_was_fitted_follows_what_is_learned(taught: Router) -> None:
    asked = rows(5, 30, 81)
    before = taught.nearest(asked)[1]
    taught.learn(Shown(rows(40, 30, 82), ["d"] * 40), {"d": "e3"})
    assert set(taught.route(asked)) == {"e3"} and bool((taught.nearest(asked)[1] < before).all())
