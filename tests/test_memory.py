"""The memory: within its budget, fair to tasks and labels, the same whatever the order in which rows came."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treering.data.example import Example
from treering.memory import Memory, Teacher, fair_shares, stack


def example(task: str, label: str, number: int) -> Example:
    return Example.of([{"role": "user", "content": f"{task} {number}"}, {"role": "assistant", "content": label}])


Stream = list[tuple[str, list[Example]]]
"""Batches of a task, in the order they come."""


def show(memory: Memory, stream: Stream) -> Memory:
    for task, rows in stream:
        memory.add(rows, task)
        assert len(memory) <= memory._budget()
    return memory


def cells(memory: Memory) -> Counter[tuple[str, str]]:
    return Counter((row.task, row.label) for row in memory.rows.values())


counts = st.dictionaries(
    st.sampled_from(["pens", "cups", "hats", "mugs"]),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 12), min_size=1),
    min_size=1,
)


def stream_of(stock: Mapping[str, Mapping[str, int]]) -> Stream:
    return [
        (task, [example(task, label, number) for label, count in labels.items() for number in range(count)])
        for task, labels in stock.items()
    ]


def resplit(stream: Stream, rng: random.Random) -> Stream:
    """The same rows in another order, in other batches."""
    rows = [(task, row) for task, found in stream for row in found]
    rng.shuffle(rows)
    made: Stream = []
    for task, row in rows:
        if made and made[-1][0] == task and rng.random() < 0.7:
            made[-1][1].append(row)
        else:
            made.append((task, [row]))
    return made


sizes = st.one_of(st.integers(0, 60), st.integers(0, 100).map(lambda share: f"{share}%"))


@given(counts, sizes, st.sampled_from(["balanced", "reservoir"]), st.randoms(use_true_random=False))
def test_never_above_the_budget(
    stock: dict[str, dict[str, int]], size: int | str, policy: str, rng: random.Random
) -> None:
    memory = show(Memory(size, policy), resplit(stream_of(stock), rng))
    rows = sum(sum(labels.values()) for labels in stock.values())
    budget = size if isinstance(size, int) else round(float(size[:-1]) / 100 * rows)
    assert len(memory) <= budget
    if isinstance(size, int):
        assert len(memory) == min(size, rows)
    assert memory.seen == stock
    assert memory.by_task().keys() == stock.keys()
    assert sum(memory.by_task().values()) == len(memory)


@given(counts, st.integers(0, 60))
def test_quotas_are_equal(stock: dict[str, dict[str, int]], size: int) -> None:
    memory = show(Memory(size), stream_of(stock))
    kept = cells(memory)
    tasks = {task: sum(kept[task, label] for label in labels) for task, labels in stock.items()}
    # Only what has no more rows may have fewer than another.
    for task, labels in stock.items():
        if tasks[task] < sum(labels.values()):
            assert tasks[task] >= max(tasks.values()) - 1
        for label, count in labels.items():
            if kept[task, label] < count:
                assert kept[task, label] >= max(kept[task, other] for other in labels) - 1


@given(counts, st.integers(0, 60), st.sampled_from(["balanced", "reservoir"]), st.randoms(use_true_random=False))
def test_batches_and_their_order_do_not_matter(
    stock: dict[str, dict[str, int]], size: int, policy: str, rng: random.Random
) -> None:
    stream = stream_of(stock)
    once = show(Memory(size, policy), stream)
    again = show(Memory(size, policy), resplit(stream, rng))
    assert list(again.rows.values()) == list(once.rows.values())


def test_showing_a_row_twice_changes_nothing() -> None:
    [(task, rows)] = stream_of({"pens": {"a": 5, "b": 5}})
    memory = Memory(20)
    memory.add(rows, task)
    memory.add(rows, task)
    assert len(memory) == 10
    assert memory.seen == {"pens": {"a": 5, "b": 5}}


@pytest.mark.parametrize("policy", ["balanced", "reservoir"])
def test_every_row_is_as_likely_to_stay(policy: str) -> None:
    """Over many seeds each of 40 rows stays equally often, the first as the last."""
    rows = [example("pens", "a", number) for number in range(40)]
    seeds, size = 600, 10
    stays: Counter[str] = Counter()
    for seed in range(seeds):
        memory = Memory(size, policy, seed)
        for start in range(0, 40, 8):
            memory.add(rows[start : start + 8], "pens")
        stays.update(list(memory.rows))
    expected = seeds * size / 40
    chi_square = sum((stays[row.id] - expected) ** 2 for row in rows) / (expected * (1 - size / 40))
    assert chi_square < 73  # 39 degrees of freedom: above it once in a thousand times.


def test_a_smaller_budget_keeps_a_part_of_what_was_kept() -> None:
    stream = stream_of({"pens": {"a": 12, "b": 12}, "cups": {"a": 12}})
    memory = show(Memory(24), stream)
    before = set(memory.rows)
    memory.size = 9
    memory.add([], "cups")
    assert len(memory) == 9
    assert before.issuperset(memory.rows)
    assert list(memory.rows.values()) == list(show(Memory(9), stream).rows.values())
    memory.size = 0
    memory.add([], "pens")
    assert len(memory) == 0
    assert memory.draw(10) == []


def test_room_is_made_for_a_new_task() -> None:
    memory = Memory(12)
    tasks = ["pens", "cups", "hats"]
    for number, task in enumerate(tasks, start=1):
        memory.add([example(task, "a", n) for n in range(50)], task)
        assert memory.by_task() == dict.fromkeys(tasks[:number], 12 // number)


@pytest.mark.parametrize(
    ("labels", "rows", "kept"),
    [(4, 40, 8), (1, 40, 2), (3, 30, 6), (4, 1000, 20), (2, 1001, 21), (77, 770, 154)],
)
def test_auto_is_two_rows_a_label_or_two_percent(labels: int, rows: int, kept: int) -> None:
    memory = Memory("auto")
    memory.add([example("pens", f"l{number % labels}", number) for number in range(rows)], "pens")
    assert len(memory) == kept
    memory.add([example("cups", "a", number) for number in range(10)], "cups")
    assert memory.by_task() == {"pens": kept, "cups": 2}


def test_an_open_task_has_the_room_of_ten_labels() -> None:
    memory = Memory("auto")
    memory.add([example("notes", f"text {number}", number) for number in range(60)], "notes", labelled=False)
    assert len(memory) == 20
    assert {row.label for row in memory.rows.values()} == {""}


def test_auto_keeps_no_more_than_there_is() -> None:
    memory = Memory("auto")
    memory.add([example("pens", "a", 1)], "pens")
    assert len(memory) == 1


@given(st.integers(0, 30), st.integers(0, 100), st.integers(0, 5))
def test_each_row_is_drawn_as_often_as_the_others(size: int, count: int, epoch: int) -> None:
    memory = show(Memory(size), stream_of({"pens": {"a": 15, "b": 15}}))
    drawn = memory.draw(count, epoch)
    assert len(drawn) == (count if size else 0)
    times = Counter(drawn)
    assert set(times) <= set(memory.rows)
    if size:
        assert {count // size, -(-count // size)} >= {times[id] for id in memory.rows}
    assert drawn == memory.draw(count, epoch)


def test_epochs_draw_in_orders_of_their_own() -> None:
    memory = show(Memory(20), stream_of({"pens": {"a": 30}}))
    assert memory.draw(20, 0) != memory.draw(20, 1)
    assert sorted(memory.draw(20, 0)) == sorted(memory.draw(20, 1))


def teacher(tokens: int, width: int = 3) -> Teacher:
    return Teacher(
        torch.randint(0, 100, (tokens, width), dtype=torch.int32),
        torch.randn(tokens, width, dtype=torch.float32).half(),
    )


def same(one: Teacher, other: Teacher) -> bool:
    return torch.equal(one.ids, other.ids) and torch.equal(one.logits, other.logits)


@pytest.mark.parametrize("taught", [0, 1, 7])
def test_what_is_saved_is_loaded(tmp_path: Path, taught: int) -> None:
    memory = show(Memory(7, "balanced", seed=3), stream_of({"pens": {"a": 12}, "cüps": {"ü": 9}}))
    memory.teachers = {id: teacher(n + 1) for n, id in enumerate(list(memory.rows)[::-1][:taught])}
    memory.save(tmp_path)
    loaded = Memory.load(tmp_path)
    assert (loaded.size, loaded.policy, loaded.seed) == (7, "balanced", 3)
    assert (loaded.rows, loaded.seen) == (memory.rows, memory.seen)
    assert list(loaded.rows) == list(memory.rows)
    assert loaded.teachers.keys() == memory.teachers.keys()
    assert all(same(loaded.teachers[id], memory.teachers[id]) for id in memory.teachers)
    # Both go on alike.
    later = stream_of({"hats": {"c": 9}})
    assert show(loaded, later).rows == show(memory, later).rows
    assert loaded.teachers.keys() == memory.teachers.keys() <= memory.rows.keys()


def test_an_empty_memory_is_saved_too(tmp_path: Path) -> None:
    Memory().save(tmp_path)
    assert len(Memory.load(tmp_path)) == 0


def test_the_same_memory_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    memory = show(Memory(5), stream_of({"pens": {"a": 12}}))
    memory.teachers = {id: teacher(2) for id in memory.rows}
    memory.save(tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("memory.json", "memory.safetensors")]
    Memory.load(tmp_path).save(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("memory.json", "memory.safetensors")] == before


def test_teachers_go_with_their_rows() -> None:
    memory = show(Memory(12), stream_of({"pens": {"a": 12}}))
    memory.teachers = {id: teacher(1) for id in memory.rows}
    show(memory, stream_of({"cups": {"a": 12}}))
    assert memory.teachers.keys() == {id for id, row in memory.rows.items() if row.task == "pens"}
    assert len(memory.teachers) == 6


def test_teachers_of_different_widths(tmp_path: Path) -> None:
    """A narrower teacher is filled up with logits that have no weight."""
    memory = show(Memory(2), stream_of({"pens": {"a": 2}}))
    first, second = memory.rows
    memory.teachers = {first: teacher(2, width=3), second: teacher(1, width=2)}
    ids, logits = stack([memory.teachers[first], memory.teachers[second]])
    assert ids.shape == logits.shape == (3, 3)
    assert logits[2, 2] == float("-inf")
    memory.save(tmp_path)
    loaded = Memory.load(tmp_path).teachers[second]
    kept = memory.teachers[second]
    assert torch.equal(loaded.logits[:, :2], kept.logits)
    assert torch.equal(loaded.logits.float().softmax(-1)[:, :2], kept.logits.float().softmax(-1))


stocks = st.dictionaries(st.text(max_size=3), st.integers(0, 30), max_size=8)


@given(st.integers(0, 120), stocks)
def test_shares_are_fair(total: int, stock: dict[str, int]) -> None:
    shares = fair_shares(total, stock)
    assert shares.keys() == stock.keys()
    assert all(0 <= shares[name] <= stock[name] for name in stock)
    assert sum(shares.values()) == min(total, sum(stock.values()))
    for name, count in stock.items():
        if shares[name] < count:
            assert shares[name] >= max(shares.values()) - 1
    assert fair_shares(total, dict(reversed(stock.items()))) == shares


@given(st.integers(0, 60), stocks, st.data())
def test_a_share_that_was_cut_never_grows_again(total: int, stock: dict[str, int], data: st.DataObject) -> None:
    """What a full cell let go can never be asked back, or the sample would not be that of all rows seen."""
    more = {name: count + data.draw(st.integers(0, 9)) for name, count in stock.items()}
    before, after = fair_shares(total, stock), fair_shares(total, {**more, "newly": 5})
    for name, count in stock.items():
        if before[name] < count:
            assert after[name] <= before[name]


def test_shares_by_hand() -> None:
    cases: Sequence[tuple[int, dict[str, int], dict[str, int]]] = [
        (0, {"a": 5}, {"a": 0}),
        (10, {}, {}),
        (7, {"a": 9, "b": 9}, {"a": 4, "b": 3}),
        (10, {"a": 1, "b": 9, "c": 9}, {"a": 1, "b": 5, "c": 4}),
        (10, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3}),
        (2, {"a": 9, "b": 9, "c": 9}, {"a": 1, "b": 1, "c": 0}),
    ]
    for total, stock, shares in cases:
        assert fair_shares(total, stock) == shares
