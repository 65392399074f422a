"""Streams: which rows come in which update, and the larger ones of `benchmarks/streams.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import streams
from treering.bench.stream import Stream
from treering.errors import UsageError
from treering.testing import toy_rows


def put(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task in ("pens", "cups", "hats"):
        put(tmp_path / "data" / task / "train.jsonl", toy_rows(task, 16))
        put(tmp_path / "data" / task / "test.jsonl", toy_rows(task, 24)[16:])
    return tmp_path / "data"


def test_orders_and_seeds(data: Path) -> None:
    stream = Stream(data, rows=8, eval_rows=4)
    named = stream.draw(1)
    assert named.tasks == ["cups", "hats", "pens"]
    orders = {tuple(stream.draw(1, order).tasks) for order in range(6)}
    assert len(orders) == 6 and all(sorted(order) == named.tasks for order in orders)
    # Another seed draws other training rows, never other test rows; an order changes neither.
    other = stream.draw(2)
    assert other.taught != named.taught and other.test == named.test
    assert stream.draw(1, 3).taught == named.taught
    assert stream.draw(2, 3).tasks == stream.draw(1, 3).tasks
    with pytest.raises(UsageError, match="3 updates have no more orders"):
        stream.draw(1, 6)
    assert [len(rows) for rows in named.taught.values()] == [8, 8, 8] and len(named.test["pens"]) == 4


def test_labels_are_limited(data: Path) -> None:
    rows = Stream(data, per_label=2).draw(1).taught["pens"]
    assert sorted(row.label for row in rows) == [f"pens {label}" for label in "aabbccdd"]


def test_numbers_say_which_update_rows_come_in(data: Path) -> None:
    (data / "pens" / "train.jsonl").rename(data / "pens" / "train-2.jsonl")
    put(data / "pens" / "train-10.jsonl", toy_rows("pens", 30)[24:])
    (data / "cups" / "train.jsonl").rename(data / "cups" / "train-2.jsonl")
    (data / "hats" / "train.jsonl").rename(data / "hats" / "train-01.jsonl")
    draw = Stream(data).draw(1)
    assert [list(update) for update in draw.updates] == [["hats"], ["cups", "pens"], ["pens"]]
    assert [len(update["pens"]) for update in draw.updates[1:]] == [16, 6] and len(draw.taught["pens"]) == 22
    put(data / "pens" / "train.jsonl", toy_rows("pens", 4))
    with pytest.raises(UsageError, match="number all or none"):
        Stream(data).draw(1)


def test_a_folder_that_is_no_stream_is_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "none", "is no folder"), (tmp_path / "empty", "holds no folder")):
        with pytest.raises(UsageError, match=words):
            Stream(folder).draw(1)
    (data / "pens" / "test.jsonl").unlink()
    with pytest.raises(UsageError, match="pens needs a train and a test file"):
        Stream(data).draw(1)


@pytest.mark.parametrize(
    ("name", "tasks", "updates"), [("clinc150", 10, 10), ("mixed-14", 14, 14), ("blurry", 10, 30), ("clinc-30", 30, 30)]
)
def test_the_larger_streams(name: str, tasks: int, updates: int, tmp_path: Path) -> None:
    for folder, names in (("clinc", [f"domain {letter}" for letter in "abcdefghij"]), ("other", streams.OTHERS)):
        for task in names:
            put(tmp_path / folder / task / "train.jsonl", toy_rows(task, 180, labels=6))
            put(tmp_path / folder / task / "test.jsonl", toy_rows(task, 204, labels=6)[180:])
    clinc, others = streams.read(tmp_path / "clinc"), streams.read(tmp_path / "other", streams.OTHERS)
    streams.write(streams.STREAMS[name](clinc, others), tmp_path / "out")
    draw = Stream(tmp_path / "out").draw(1)
    assert (len(draw.tasks), len(draw.updates)) == (tasks, updates)
    # Every row is taught once.
    taught = [row.id for rows in draw.taught.values() for row in rows]
    assert len(taught) == len(set(taught)) == 180 * (14 if name == "mixed-14" else 10)
    if name == "mixed-14":
        assert [draw.tasks.index(other) for other in streams.OTHERS] == [2, 5, 8, 11]
    if name == "clinc-30":
        assert {row.label for row in draw.test["domain a-b"]} == {row.label for row in draw.taught["domain a-b"]}
        assert len({row.label for row in draw.test["domain a-b"]}) == 2
    if name == "blurry":
        came = [[at for at, update in enumerate(draw.updates) if task in update] for task in draw.tasks]
        assert all(len(updates) >= 7 and updates[-1] - updates[0] > 15 for updates in came)
        early, late = (
            [row.label for update in part for row in update.get("domain c", ())]
            for part in (draw.updates[:10], draw.updates[20:])
        )
        assert early.count("domain c a") > 1.5 * late.count("domain c a")
