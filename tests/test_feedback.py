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
from treering.feedback import Feedback, Rule
from treering.files import append_line, json_line

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
        {"rating": "up", "messages": [{"role": "user", "content": "\ud800"}]},
        {"rating": "up", "comment": "\ud800"},
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
    rule = Rule(ws, "corrections")
    assert [len(rule.accept()) for _ in range(2)] == [1, 0]
    [path] = Rule(ws, "all").accept()
    assert "refund" in path.read_text()
    assert [entry.state for entry in feedback.read(ws)] == ["accepted", "accepted"]


def test_the_rule_reads_each_line_once(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        feedback.keep(ws, said(rating="down"), None)
    rule, read = Rule(ws, "corrections"), list[object]()
    take = Rule._take

    def noted(self: Rule, found: dict[str, object]) -> None:
        read.append(found.get("id", "a decision"))
        take(self, found)

    monkeypatch.setattr(Rule, "_take", noted)
    assert rule.accept() == [] and len(read) == 3
    fix = feedback.keep(ws, said(correction="fault"), None)
    with (ws.root / feedback.FILE).open("ab") as log:
        log.write(b'{"id": "half')  # A crash left it, or it is being written.
    assert len(rule.accept()) == 1 and rule.accept() == []
    assert read[3:] == [fix.id, "a decision"]


def test_the_rule_leaves_what_somebody_decided(ws: Workspace) -> None:
    rule = Rule(ws, "corrections")
    first = feedback.keep(ws, said(correction="fault", task="coffee"), None)
    feedback.reject(ws, [first.id])
    assert rule.accept() == []
    feedback.keep(ws, said(correction="fault", task="tea"), None)
    assert [path.parent.name for path in rule.accept()] == ["tea"]


def test_the_rule_goes_on_when_the_log_is_mended(ws: Workspace) -> None:
    rule, log = Rule(ws, "corrections"), ws.root / feedback.FILE
    feedback.keep(ws, said(correction="fault"), None)
    kept = log.read_bytes()
    log.write_bytes(b"{}\n" + kept)
    for _ in range(2):
        with pytest.raises(TreeringError, match="line 1 is damaged"):
            rule.accept()
    log.write_bytes(kept)
    assert len(rule.accept()) == 1


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


def test_what_cannot_be_written_keeps_no_other_back(ws: Workspace) -> None:
    good = feedback.keep(ws, said(correction="fault", task="coffee"), None)
    bad = good.model_copy(update={"id": "bad", "feedback": said(correction="x", task="\N{KATAKANA LETTER A}" * 100)})
    with (ws.root / feedback.FILE).open("ab") as log:  # As it came from a server that did not look.
        log.write(json_line(bad.model_dump(exclude_none=True, exclude={"state"}) | {"key": None}))
    last = feedback.keep(ws, said(correction="fault", task="tea"), None)
    rule = Rule(ws, "corrections")
    with pytest.raises(TreeringError, match="File name too long"):
        rule.accept()
    assert sorted(path.parent.name for path in ws.inbox.rglob("*.jsonl")) == ["coffee", "tea"]
    assert [entry.id for entry in feedback.waiting(feedback.read(ws))] == ["bad"]
    feedback.reject(ws, ["bad"])
    assert last.id and rule.accept() == []


def test_a_task_that_no_folder_can_be_named_for_is_refused(ws: Workspace) -> None:
    with pytest.raises(UsageError, match="300 bytes"):
        feedback.keep(ws, said(correction="x", task="\N{KATAKANA LETTER A}" * 100), None)
    assert not feedback.read(ws)


def test_a_line_costs_the_same_however_long_the_log_is(tmp_path: Path) -> None:
    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    log = tmp_path / "log.jsonl"
    log.write_bytes(b"[1]\n" * 1_000_000)
    before = read()
    append_line(log, [2])
    assert read() - before < 100_000
    assert log.read_bytes().endswith(b"[1]\n[2]\n")


def test_what_nobody_could_read_again_is_no_line() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for value, words in (
        (deep, "nested too deeply"),
        ({"a\ud800": 1}, r"U\+D800"),
        (float("nan"), "not JSON compliant"),
    ):
        with pytest.raises(ValueError, match=words):
            json_line(value)


def test_a_line_that_a_crash_cut_short_goes(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for before, after in ((b"", b""), (b"[1]\n[", b"[1]\n"), (b"[", b"")):
        log.write_bytes(before)
        append_line(log, [2])
        assert log.read_bytes() == after + b"[2]\n"


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
