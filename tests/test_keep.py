"""Orders inside a cell: what each policy keeps, in the same order however rows came, and as the memory shrinks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.test_memory import cells, example, stream_of
from treering import Workspace, registry
from treering.data.example import Example
from treering.keep import ORDERED, Known, hardest, herded, most_forgotten, newest
from treering.memory import Memory
from treering.model import encode, load, load_tokenizer
from treering.passes import losses
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]


def test_hard_rows_first_and_outliers_last() -> None:
    found = [0.2, 0.4, 9.0, 0.1, 0.3, 0.5]
    lower, upper = np.quantile(found, [0.25, 0.75])
    assert upper + 1.5 * (upper - lower) < 9.0
    assert hardest(found) == [5, 1, 4, 0, 3, 2]
    assert hardest([1.0, 1.0, 1.0]) == [0, 1, 2]
    assert hardest([0.5, 2.0]) == [1, 0]  # Of two none is extreme.
    assert hardest([3.0]) == [0]


@given(st.lists(st.floats(0, 20), min_size=1, max_size=40))
def test_only_what_is_above_the_fence_is_put_last(found: list[float]) -> None:
    lower, upper = np.quantile(found, [0.25, 0.75])
    fence = upper + 1.5 * (upper - lower)
    ordered = [found[at] for at in hardest(found)]
    assert sorted(ordered) == sorted(found)
    extreme = sum(value > fence + 1e-9 for value in found)
    sure = ordered[: len(found) - sum(value > fence - 1e-9 for value in found)]
    assert all(one >= other for one, other in pairwise(sure))
    assert extreme == 0 or min(ordered[-extreme:]) > fence


def test_the_forgotten_and_the_new_come_first() -> None:
    assert most_forgotten([0.1, -0.5, 2.0, 0.1]) == [2, 0, 3, 1]
    assert newest([1, 3, 2, 3]) == [1, 3, 2, 0]


def mean_distance(rows: np.ndarray, mean: np.ndarray) -> float:
    return float(np.linalg.norm(rows.mean(0) - mean))


def test_each_herded_row_brings_the_mean_as_near_as_any_could() -> None:
    """Beside the definition: of all rows left, none would have made the mean of those taken nearer."""
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    weights = [1.0] * 9 + [4.0] * 3
    order = herded(rows, weights, 12)
    assert sorted(order) == list(range(12))
    unit = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True)
    mean = np.average(unit, axis=0, weights=weights)
    for taken in range(12):
        reached = mean_distance(unit[order[: taken + 1]], mean)
        others = [mean_distance(unit[[*order[:taken], other]], mean) for other in order[taken:]]
        assert reached == pytest.approx(min(others))
    assert herded(rows, weights, 4)[:4] == order[:4]
    left = herded(rows, weights, 4)[4:]
    assert left == sorted(left)


def test_herded_rows_tell_all_directions() -> None:
    """Of two clumps, both are kept in their proportion; chance might take one alone."""
    rows = torch.tensor([[1.0, 0.01 * n] for n in range(6)] + [[0.01 * n, 1.0] for n in range(3)])
    assert sum(at < 6 for at in herded(rows, [1.0] * 9, 3)[:3]) == 2


def ordered(policy: str, size: int | str = 8, seed: int = 0) -> Memory:
    return Memory(size, policy, seed)


def told(memory: Memory, number: int = 0) -> Memory:
    """Order `memory` by facts that follow from the ids."""
    draws = {id: random.Random(f"{id}:{number}") for id in memory.rows}
    found = {id: draw.uniform(0, 3) for id, draw in draws.items()}
    about = {id: torch.tensor([draw.uniform(-1, 1) for _ in range(4)]) for id, draw in draws.items()}
    memory.order(found, about)
    return memory


STOCK = {"pens": {"a": 9, "b": 7}, "cups": {"a": 12}}


@pytest.mark.parametrize("size", [8, "auto", "20%"])
@pytest.mark.parametrize("policy", ORDERED)
def test_the_rooms_are_those_of_balanced(policy: str, size: int | str) -> None:
    balanced, memory = Memory(size), ordered(policy, size)
    for task, rows in stream_of(STOCK):
        balanced.add(rows, task)
        memory.show(rows, task)
    assert cells(told(memory)) == cells(balanced)
    assert memory.seen == balanced.seen == STOCK
    assert memory.known.keys() == memory.rows.keys()


@pytest.mark.parametrize("policy", ORDERED)
def test_the_order_in_which_rows_came_does_not_matter(policy: str) -> None:
    found = []
    for shuffle in (random.Random(0).shuffle, random.Random(1).shuffle, lambda _: None):
        memory = ordered(policy)
        for number in range(2):
            stream = [(task, [row]) for task, rows in stream_of(STOCK) for row in rows[number::2]]
            shuffle(stream)
            for task, rows in stream:
                memory.show(rows, task)
            told(memory, number)
        found.append(memory)
    assert list(found[0].rows.values()) == list(found[1].rows.values()) == list(found[2].rows.values())
    assert found[0].known == found[1].known == found[2].known
    assert len(found[0]) == 8


@pytest.mark.parametrize("policy", ORDERED)
@pytest.mark.parametrize("size", [7, 3, 1, 0])
def test_a_memory_that_shrinks_is_as_if_it_had_been_small(policy: str, size: int) -> None:
    large, small = ordered(policy, 14), ordered(policy, size)
    for memory in (large, small):
        for task, rows in stream_of(STOCK):
            memory.show(rows, task)
        told(memory)
    large.size = size
    large.cut()
    assert list(large.rows.values()) == list(small.rows.values()) and len(small) == size


@pytest.mark.parametrize("policy", ORDERED)
def test_what_is_known_is_saved(policy: str, tmp_path: Path) -> None:
    memory = ordered(policy)
    for number, (task, rows) in enumerate(stream_of(STOCK)):
        memory.show(rows, task)
        told(memory, number)
    memory.save(tmp_path)
    loaded = Memory.load(tmp_path)
    assert (loaded.known, list(loaded.rows)) == (memory.known, list(memory.rows))
    for other in (memory, loaded):
        other.show([example("hats", "c", n) for n in range(9)], "hats")
        told(other, 2)
    assert (loaded.known, list(loaded.rows)) == (memory.known, list(memory.rows))


def test_chance_keeps_no_facts(tmp_path: Path) -> None:
    """Nothing of this changes what the policies of chance keep or write."""
    memory = Memory(8)
    memory.add([example("pens", "a", n) for n in range(9)], "pens")
    memory.save(tmp_path)
    assert '"known"' not in (tmp_path / "memory.json").read_text()
    loaded = Memory.load(tmp_path)
    loaded.policy = "ageing"
    loaded.show([example("pens", "a", n) for n in range(20, 25)], "pens")
    loaded.order()
    assert Counter(known.update for known in loaded.known.values()) == {0: 3, 1: 5}  # What was there is older.
    loaded.policy = "balanced"
    loaded.add([], "pens")
    assert list(loaded.rows) == sorted(loaded.rows, key=lambda id: loaded._chance(loaded.rows[id]))


def test_a_policy_that_lacks_facts_says_so() -> None:
    for policy, what in (("hard", "losses"), ("forgotten", "losses"), ("diverse", "features")):
        with pytest.raises(ValueError, match=f"{policy} orders rows by their {what}: call show, then order"):
            ordered(policy).add([example("pens", "a", 1)], "pens")
    memory = ordered("ageing", 3)
    memory.add([example("pens", "a", n) for n in range(5)], "pens")
    memory.add([example("pens", "a", n) for n in range(5, 7)], "pens")
    assert Counter(known.update for known in memory.known.values()) == {2: 2, 1: 1}


def test_the_rise_is_counted_from_when_a_row_was_learned() -> None:
    memory = ordered("forgotten", 4)
    first = [example("pens", "a", n) for n in range(4)]
    memory.show(first, "pens")
    memory.order({row.id: 1.0 for row in first})
    assert {(known.learned, known.loss) for known in memory.known.values()} == {(1.0, 1.0)}
    second = [example("pens", "a", n) for n in range(10, 14)]
    memory.show(second, "pens")
    now = [1.5, 0.5, 3.0, 0.9]
    memory.order(dict(zip((row.id for row in [*first, *second]), [*now, 9.0, 9.0, 9.0, 9.0], strict=True)))
    # Those that rose, then the new ones, which cannot have; what got better is let go.
    assert list(memory.rows)[:2] == [first[2].id, first[0].id]
    assert set(list(memory.rows)[2:]) < {row.id for row in second}
    assert memory.known[first[0].id] == Known(1, 1, 1.0, 1.5)
    assert memory.known[list(memory.rows)[3]] == Known(3, 2, 9.0, 9.0)


def test_old_rows_stand_for_all_that_were_seen() -> None:
    """A cell that saw 90 rows of one kind keeps telling of them, though only few are there to be counted."""
    memory = ordered("diverse", 10)
    old, new = ([example("pens", "a", n) for n in span] for span in (range(90), range(100, 110)))
    about = {row.id: torch.tensor([1.0, 0.001 * n]) for n, row in enumerate(old)}
    about |= {row.id: torch.tensor([0.001 * n, 1.0]) for n, row in enumerate(new)}
    for rows in (old, new):
        memory.show(rows, "pens")
        memory.order(features=about)
    assert sum(row.id in memory.rows for row in new) == 1


UPDATES = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 8, "gate": {"floor": 1.0}}


def taught(ws: Workspace, *tasks: str) -> Memory:
    for task in tasks:
        ws.ingest(toy_rows(task, 20), task=task)
        version = ws.update()
        assert version is not None
        ws.promote(version.name, force=True)
    return Memory.load(registry.versions(ws)[-1].folder)


@pytest.mark.parametrize("policy", ORDERED)
def test_an_update_keeps_by_policy(workspace: MakeWorkspace, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same; what is kept is what the model's own losses say, and nothing is read that is not needed."""
    reads: Counter[str] = Counter()
    for name in ("losses", "features"):
        read = getattr(__import__("treering.candidate", fromlist=[name]), name)

        def counted(*given: object, name: str = name, read: Callable[..., object] = read, **more: object) -> object:
            reads[name] += 1
            return read(*given, **more)

        monkeypatch.setattr(f"treering.candidate.{name}", counted)
    settings = {**UPDATES, "protect": ["replay", "distill"], "memory": {"policy": policy, "size": 12}}
    ws = workspace("one", **settings)
    memory = taught(ws, "pens", "cups")
    wanted = {"hard": {"losses": 2}, "forgotten": {"losses": 2}, "diverse": {"features": 2}, "ageing": {}}[policy]
    assert reads == wanted
    assert memory.by_task() == {"pens": 6, "cups": 6} and memory.known.keys() == memory.rows.keys()
    assert {known.update for id, known in memory.known.items() if memory.rows[id].task == "cups"} == {2}
    again = taught(workspace("two", **settings), "pens", "cups")
    assert (again.rows, again.known) == (memory.rows, memory.known)
    if "losses" not in wanted:
        return
    version = registry.versions(ws)[-1]
    base = Path(str(ws.config().model_name_or_path))
    model, tokenizer = load(base, ws.config(), version), load_tokenizer(base)
    tokens = [encode(tokenizer, row) for row in ws.catalog.examples(list(memory.rows)).values()]
    assert isinstance(tokenizer.pad_token_id, int)
    measured = losses(model, tokens, ws.config(), tokenizer.pad_token_id)
    for row, loss in zip(tokens, measured, strict=True):
        assert memory.known[row.id].loss == pytest.approx(loss, rel=1e-3)


def test_another_policy_may_take_over(workspace: MakeWorkspace) -> None:
    ws = workspace(**UPDATES)
    before = taught(ws, "pens")
    ws.ingest(toy_rows("cups", 20), task="cups")
    version = ws.update("memory.policy=forgotten")
    assert version is not None
    memory = Memory.load(version.folder)
    assert set(before.rows) == {id for id, row in memory.rows.items() if row.task == "pens"}
    assert {known.update for id, known in memory.known.items() if id in before.rows} == {0}
    assert all(known.learned == known.loss is not None for known in memory.known.values())


def test_a_loss_without_end_can_be_saved(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(model: object, rows: list[Example], *_: object) -> list[float]:
        return [float("nan"), *[0.1] * (len(rows) - 1)]

    monkeypatch.setattr("treering.candidate.losses", endless)
    ws = workspace(**UPDATES, memory={"policy": "hard", "size": 40})
    memory = taught(ws, "pens")
    (row,) = (id for id, known in memory.known.items() if known.loss == 1e30)
    label = memory.rows[row].label
    ranks = [memory.known[id].rank for id, one in memory.rows.items() if one.label == label]
    assert memory.known[row].rank == max(ranks) and len(ranks) >= 4


def test_the_candidate_orders_all_at_once(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks in one update are one update to the memory."""
    shown: list[int] = []
    order = Memory.order

    def noted(self: Memory, *given: Any) -> None:
        shown.append(len(self.rows))
        order(self, *given)

    monkeypatch.setattr(Memory, "order", noted)
    ws = workspace(**UPDATES, memory={"policy": "ageing"})
    for task in ("pens", "cups"):
        ws.ingest(toy_rows(task, 20), task=task)
    ws.update()
    assert shown == [36]
