"""The whole way on the real default model, with rows of the packaged stream."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace, examples
from treering.answers import predict, score
from treering.registry import current, versions

pytestmark = pytest.mark.real


def test_two_product_lines_on_the_default_model(tmp_path: Path) -> None:
    ws = Workspace.create(tmp_path / "shop", per_device_train_batch_size=8, max_steps=12, learning_rate=2e-3)
    for task, labels in (("1-coffee", ("grinder jam", "stale beans")), ("4-audio", ("ear tip fit", "stylus cleaning"))):
        train, test = _rows(task, "train", labels), [row for one in labels for row in _rows(task, "test", (one,))[:3]]
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


@pytest.mark.soak
def test_under_a_limit_of_its_own_a_batch_that_does_not_fit_is_taken_in_pieces(tmp_path: Path) -> None:
    """The command itself, as under `ulimit -v`: libraries, code that is made on the way and threads count too."""
    lines = (examples.path() / "1-coffee" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    texts, answers = [turn[-2]["content"] for turn in turns], [turn[-1]["content"] for turn in turns]
    rows = [{"text": " ".join(texts[at : at + 6]), "label": answers[at]} for at in range(len(texts) - 6)]
    settings: dict[str, Any] = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-3, "protect": ["replay"]}
    ws = Workspace.create(tmp_path / "ws", per_device_train_batch_size=32, eval={"batch_size": 2}, **settings)
    ws.ingest(rows[:60], task="long", held_out=rows[60:])
    update = f"from treering.cli import run; raise SystemExit(run(['update', '-w', {str(ws.root)!r}]))"
    limited = ["bash", "-c", 'ulimit -v 8200000; exec "$@"', "limited", sys.executable, "-c", update]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    assert "out of memory at step" in done.stderr
    assert versions(ws)[-1].manifest["cost"]["steps"] == 2


def _rows(task: str, split: str, labels: tuple[str, ...]) -> list[dict[str, list[dict[str, str]]]]:
    lines = (examples.path() / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["messages"][-1]["content"] in labels]
