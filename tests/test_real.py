"""The whole way on the real default model, with rows of the packaged stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treering import Workspace, examples
from treering.answers import predict, score
from treering.registry import current

pytestmark = pytest.mark.real


def test_two_product_lines_on_the_default_model(tmp_path: Path) -> None:
    ws = Workspace.create(tmp_path / "shop", per_device_train_batch_size=8, max_steps=20, learning_rate=2e-3)
    for task, labels in (("1-coffee", ("grinder jam", "stale beans")), ("4-audio", ("ear tip fit", "stylus cleaning"))):
        train, test = (_rows(task, split, labels) for split in ("train", "test"))
        assert ws.ingest(train, task=task, held_out=test).accepted == len(train) + len(test)
        version = ws.update()
        assert version is not None
        assert version.promote
    now = current(ws)
    assert now is not None
    assert now.name == "v2"
    # Two labels a task, four in all: guessing would reach a quarter.
    assert now.manifest["summary"]["average_accuracy"] >= 0.6
    assert now.manifest["summary"]["old"] >= 0.5
    assert score(ws, now, quiet=True)["tasks"]["4-audio"]["score"] == now.scores["4-audio"]

    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    system = _rows("1-coffee", "test", ("grinder jam",))[0]["messages"][0]
    asked.write_text(json.dumps({"messages": [system, {"role": "user", "content": "The burrs of my mill are stuck."}]}))
    assert predict(ws, now, asked, answered, quiet=True)["rows"] == 1
    assert json.loads(answered.read_text())["prediction"] in {"grinder jam", "stale beans"}


def _rows(task: str, split: str, labels: tuple[str, ...]) -> list[dict[str, list[dict[str, str]]]]:
    lines = (examples.path() / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["messages"][-1]["content"] in labels]
