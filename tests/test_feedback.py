"""Feedback: kept, reviewed, and only then rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from treering import Workspace, feedback
from treering.cli import run
from treering.errors import TreeringError, UsageError
from treering.feedback import Feedback

ASKED = [{"role": "user", "content": "my grinder hums"}]


@pytest.fixture
def ws(workspace: Callable[..., Workspace]) -> Workspace:
    return workspace()


def said(**more: object) -> Feedback:
    return Feedback.model_validate({"messages": ASKED, "answer": "refund", **more})


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"rating": "fine"},
        {"correction": ""},
        {"rating": "up", "answer": None},
        {"rating": "up", "task": "../x"},
        {"rating": "up", "messages": [{"role": "user", "content": float("nan")}]},
    ],
)
def test_it_must_say_something(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        said(**wrong)


def test_only_what_names_a_good_answer_makes_a_row() -> None:
    def answer(**more: object) -> object:
        row = said(**more).row
        return row and row["messages"][-1]["content"]

    assert answer(rating="up") == "refund"
    assert answer(rating="down") is None
    assert answer(rating="down", correction="fault") == answer(correction="fault") == "fault"


def test_nothing_is_trained_on_before_it_is_accepted(ws: Workspace) -> None:
    fix = feedback.keep(ws, said(correction="fault", task="coffee"), "k1")
    up = feedback.keep(ws, said(rating="up"), None)
    down = feedback.keep(ws, said(rating="down"), None)
    assert not list(ws.inbox.rglob("*.jsonl"))
    assert [entry.id for entry in feedback.waiting(feedback.read(ws))] == [fix.id, up.id]
    with pytest.raises(UsageError, match=down.id):
        feedback.accept(ws, [fix.id, down.id])
    assert not list(ws.inbox.rglob("*.jsonl"))
    [path] = feedback.accept(ws, [fix.id])
    assert path.parent.name == "coffee"
    assert json.loads(path.read_text())["messages"] == [*ASKED, {"role": "assistant", "content": "fault"}]
    feedback.reject(ws, [down.id])
    assert [entry.state for entry in feedback.read(ws)] == ["accepted", "waiting", "rejected"]
    with pytest.raises(UsageError, match="no feedback waits"):
        feedback.accept(ws, [fix.id])
    done = ws.ingest()
    assert done.accepted == 1 and done.tasks == {"coffee": 1}


def test_the_rule_lets_through_what_it_says(ws: Workspace) -> None:
    feedback.keep(ws, said(correction="fault"), None)
    feedback.keep(ws, said(rating="up"), None)
    assert feedback.accept_by_rule(ws, "review") == []
    assert len(feedback.accept_by_rule(ws, "corrections")) == 1
    assert feedback.accept_by_rule(ws, "corrections") == []
    [path] = feedback.accept_by_rule(ws, "all")
    assert "refund" in path.read_text()


def test_a_crash_between_file_and_decision_repeats_the_same_file(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = feedback.keep(ws, said(correction="fault"), None)
    with monkeypatch.context() as crash:
        crash.setattr(feedback, "_decide", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            feedback.accept(ws, [entry.id])
    before = {path: path.read_bytes() for path in ws.inbox.rglob("*.jsonl")}
    feedback.accept(ws, [entry.id])
    assert {path: path.read_bytes() for path in ws.inbox.rglob("*.jsonl")} == before


def test_a_damaged_log_is_told(ws: Workspace) -> None:
    feedback.keep(ws, said(rating="up"), None)
    with (ws.root / feedback.FILE).open("a") as log:
        log.write("{}\n")
    with pytest.raises(TreeringError, match="line 2 is damaged"):
        feedback.read(ws)


def test_on_the_command_line(ws: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    entry = feedback.keep(ws, said(correction="fault"), None)
    feedback.keep(ws, said(rating="down"), None)
    assert run(["feedback", "list", "-w", str(ws.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert next(w["id"] for w in found["waiting"]) == entry.id and found["accepted"] == found["rejected"] == 0
    assert run(["feedback", "accept", "all", "-w", str(ws.root), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["accepted"] == 1 and Path(made["files"][0]).exists()
    assert run(["feedback", "reject", "all", "-w", str(ws.root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rejected": 1}
    assert run(["feedback", "reject", "nobody", "-w", str(ws.root)]) == 3
