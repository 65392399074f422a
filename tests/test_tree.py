"""A tree of tokens gives what reading every row alone gives, however the rows share and whatever was read before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from treering import attention
from treering.config import Config
from treering.model import load_base
from treering.passes import TOKENS, cut
from treering.tree import Tree


@pytest.fixture(scope="module", params=[attention.NAME, "eager"])
def model(request: pytest.FixtureRequest, model_folder: Path) -> Any:
    found: Any = load_base(model_folder, Config(bf16=False))
    assert found.config._attn_implementation == attention.NAME
    found.set_attn_implementation(request.param)
    return found.eval()


def alone(model: Any, row: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([row])).logits[0]
    return found


@pytest.mark.parametrize("common", [0, 7])
def test_every_way_is_read_as_if_alone(model: Any, common: int) -> None:
    draw = random.Random(common)
    begun = [draw.randrange(100) for _ in range(common)]
    # Few different tokens, so that rows share beginnings of all lengths; the first two rows are the same.
    rows = [begun + draw.choices(range(3), k=length) for length in (5, 1, 2, 9, 6, 6, 30, 5)]
    rows.insert(0, rows[0])
    wanted = [sorted(draw.sample(range(common, len(row)), min(3, len(row) - common))) for row in rows]
    tree = Tree(model, Config(bf16=False), 0)
    logits = tree.begin(rows, wanted)
    right = [alone(model, row)[places] for row, places in zip(rows, wanted, strict=True)]
    torch.testing.assert_close(logits, torch.cat(right), rtol=1e-4, atol=1e-4)

    paths = [tree.path(row) for row in rows]
    for _ in range(3):
        ways = [[draw.choices(range(3), k=draw.randint(1, 4)) for _ in range(draw.randint(1, 3))] for _ in rows]
        tree.go_on(zip(paths, ways, strict=True))
        for at, row in enumerate(rows):
            path = paths[at]
            for way in ways[at]:
                path = paths[at]
                for depth, token in enumerate(way, 1):
                    number = tree.after(path, token)
                    assert number is not None
                    path = [*path, number]
                    assert tree.likeliest[number] == int(alone(model, row + way[:depth])[-1].argmax())
            rows[at], paths[at] = row + ways[at][-1], path


def test_what_was_read_is_not_read_again(model: Any) -> None:
    tree = Tree(model, Config(bf16=False), 0)
    tree.begin([[1, 2, 3], [1, 2, 4, 5]], [[2], [3]])
    before = dict(tree.likeliest)
    tree.go_on([(tree.path([1, 2, 4]), [[5]])])
    assert tree.likeliest == before
    assert tree.after(tree.path([1, 2, 4]), 5) in before
    assert tree.after(tree.path([1, 2, 4]), 6) is None


def test_the_first_pass_may_be_the_last(model: Any) -> None:
    rows = [[1, 2, 3], [1, 2, 4, 5]]
    tree = Tree(model, Config(bf16=False), 0, keep=False)
    right = torch.cat([alone(model, rows[0])[1:], alone(model, rows[1])[1:]])
    torch.testing.assert_close(tree.begin(rows, [[1, 2], [1, 2, 3]]), right, rtol=1e-4, atol=1e-4)


lengths = st.lists(st.integers(1, 60) | st.integers(1000, 3000), max_size=80)


@given(lengths, st.integers(1, 70), st.integers(1, 4))
def test_parts_have_every_row_once_and_are_no_larger_than_allowed(lengths: list[int], size: int, at_once: int) -> None:
    rows = [[7] * length for length in lengths]
    parts = cut(rows, size, at_once)
    assert sorted(at for part in parts for at in part) == list(range(len(rows)))
    for part in parts:
        assert 0 < len(part) <= size
        assert len(part) == 1 or sum(len(rows[at]) for at in part) <= 1.5 * TOKENS + max(lengths)


@pytest.mark.parametrize(("count", "at_once", "parts"), [(96, 2, 2), (96, 1, 2), (130, 2, 4), (1, 2, 1), (0, 2, 0)])
def test_no_thread_waits_for_the_last_part(count: int, at_once: int, parts: int) -> None:
    draw = random.Random(0)
    rows = [[draw.randrange(9) for _ in range(draw.randint(10, 30))] for _ in range(count)]
    found = cut(rows, 64, at_once)
    assert len(found) == parts
    if parts > 1:
        sizes = [sum(len(rows[at]) for at in part) for part in found]
        assert max(sizes) < 1.2 * min(sizes)
