"""What models make of waiting rows: labels that look wrong, and how far they are from those learned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from treering import Workspace
from treering.data.stats import stats
from treering.looks import Looks, _spread
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    """v1 knows forty rows of one task by heart."""
    ws = workspace(
        learning_rate=1e-2, num_train_epochs=30.0, per_device_train_batch_size=8, lora_rank=16, gate={"floor": 1.0}
    )
    ws.ingest(toy_rows("a"), task="a")
    assert ws.update() is not None
    return ws


def test_a_label_that_the_version_is_sure_is_another_is_doubted(ws: Workspace) -> None:
    rows = toy_rows("a", 80)[60:]
    wrong = {**rows[3], "label": "a a"}  # Sorted as d.
    ws.ingest([*rows[:3], wrong, *rows[4:]], task="a")
    found = stats(ws, "a", Looks(ws))["a"]
    waiting = ws.catalog.waiting(set())
    assert [(doubt["label"], doubt["likely"]) for doubt in found["doubts"]] == [("a a", "a d")]
    [doubt] = found["doubts"]
    assert doubt["line"] == 4 and doubt["probability"] >= 0.8
    assert doubt["id"] in waiting["a"]
    assert 0 <= found["drift"]["embedding"] < 0.7


def test_what_the_version_does_not_know_is_not_doubted(ws: Workspace) -> None:
    ws.ingest(toy_rows("b"), task="b")
    ws.ingest([{"question": f"what is {n} like?", "answer": f"it is like {n}"} for n in range(8)], task="c")
    found = stats(ws, looks=Looks(ws))
    assert found["b"]["doubts"] is None and found["c"]["doubts"] is None  # Neither was learned.
    assert found["a"]["doubts"] is None  # Nothing waits.
    ws.ingest([{"text": "Zz! " * 9 + f"{n} ?", "label": "a a"} for n in range(20)], task="a")
    far = stats(ws, "a", Looks(ws))["a"]
    assert far["drift"]["embedding"] > 1


def test_without_a_version_nothing_is_doubted(workspace: MakeWorkspace) -> None:
    ws = workspace()
    ws.ingest(toy_rows("a"), task="a")
    assert stats(ws, looks=Looks(ws))["a"]["doubts"] is None


def test_distances_by_chance_are_taken_off() -> None:
    rows = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert _spread(rows) == 2.0
