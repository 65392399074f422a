"""The index of near duplicates: what is alike is found, on disk as in memory."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from treering.data import index
from treering.data.index import BANDS, CROWD, Index, signatures, within


def sets(count: int, seed: int = 0) -> list[set[str]]:
    draw = random.Random(seed)
    return [{f"w{draw.randrange(5000)}" for _ in range(20)} for _ in range(count)]


def changed(words: set[str], count: int) -> set[str]:
    return {*sorted(words)[count:], *(f"new{at}" for at in range(count))}


def test_what_is_alike_is_found_and_little_else(tmp_path: Path) -> None:
    rows = sets(2000)
    kept = Index(tmp_path, ())
    for start in range(0, 2000, 250):
        kept.add(signatures(rows[start : start + 250]), range(start, start + 250))
    asked = [changed(words, 1) for words in rows[:1000]]  # A Jaccard index of 0.905.
    pairs = set(kept.near(signatures(asked), 0.8))
    assert sum((at, at) in pairs for at in range(1000)) >= 985
    assert len(pairs) < 1050
    unlike = set(kept.near(signatures([changed(words, 10) for words in rows]), 0.8))  # 0.33
    assert len(unlike) < 20


def test_on_disk_it_is_the_same(tmp_path: Path) -> None:
    rows = sets(300)
    one = Index(tmp_path, ())
    one.add(signatures(rows[:200]), range(200))
    names = one.save()
    two = Index(tmp_path, names)
    assert isinstance(two.runs[0].keys, np.memmap)
    two.add(signatures(rows[200:250]), range(200, 250))
    two.add(signatures(rows[250:]), range(250, 300))
    asked = signatures([changed(words, 1) for words in rows])
    found = sorted(two.near(asked, 0.8))
    names = two.save()
    assert [len(run.rows) for run in two.runs] == [300]
    assert sorted(Index(tmp_path, names).near(asked, 0.8)) == found
    assert {at for at, row in found if at == row} >= set(range(290))
    index.clear(tmp_path, names)
    assert [path.name for path in tmp_path.iterdir()] == names


def test_runs_stay_few(tmp_path: Path) -> None:
    kept = Index(tmp_path, ())
    for at in range(64):
        kept.add(signatures(sets(4, at)), range(4 * at, 4 * at + 4))
        assert len(kept.runs) <= 8
    assert sum(len(run.rows) for run in kept.runs) == 256
    assert all(len(run.keys) == BANDS * len(run.rows) and (np.diff(run.keys) >= 0).all() for run in kept.runs)


def test_within_a_batch_the_later_row_is_told(tmp_path: Path) -> None:
    first, second, third = sets(3)
    pairs = list(within(signatures([first, second, changed(first, 1), third]), 0.8))
    assert pairs == [(2, 0)]
    assert list(within(signatures([]), 0.8)) == []


def test_a_crowd_costs_no_more_than_its_last_rows(tmp_path: Path) -> None:
    words = sets(1)[0]
    kept = Index(tmp_path, ())
    kept.add(signatures([words] * 500), range(500))
    assert sorted(row for _, row in kept.near(signatures([words]), 0.8)) == list(range(500 - CROWD, 500))


@pytest.mark.parametrize("damage", ["missing", "short", "garbage", "pickle"])
def test_a_damaged_run_is_told(tmp_path: Path, damage: str) -> None:
    kept = Index(tmp_path, ())
    kept.add(signatures(sets(10)), range(10))
    [name] = kept.save()
    path = tmp_path / name / "rows.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        np.save(path, np.zeros(3, np.uint32))
    elif damage == "garbage":
        path.write_bytes(b"garbage")
    else:
        np.save(path, np.array([object()]), allow_pickle=True)
    with pytest.raises((OSError, ValueError)):
        Index(tmp_path, [name])
