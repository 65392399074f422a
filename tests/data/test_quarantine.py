"""Rows in quarantine: seen, corrected, taken in all the same, written out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from treering import Workspace
from treering.cli import run
from treering.data import quarantine
from treering.data.schema import rows as stored_rows
from treering.errors import UsageError

MakeWorkspace = Callable[..., Workspace]

LONG = "please tell me how I can send the lamp back that I bought from you"


def row(question: str, answer: str = "yes") -> dict[str, str]:
    return {"question": question, "answer": answer}


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    """One of each: a rule's, one that is no row, two that contradict each other, a leak, a held-out row."""
    ws = workspace(val_size=0.0)
    rows: list[Mapping[str, object]] = [row("a", "A"), {"nothing": 1}, row("How much?", "one"), row("How much?", "two")]
    ws.ingest(
        [*rows, row(LONG), row("good")],
        task="t",
        held_out=[row(f"{LONG}!"), row("b", "B")],
    )
    return ws


def numbers(ws: Workspace) -> dict[tuple[str, int], int]:
    return {(entry["rule"], entry["line"]): entry["number"] for entry in quarantine.listed(ws)}


def sides(ws: Workspace) -> dict[str, str]:
    found = {"train": ws.catalog.waiting(()), "held_out": ws.catalog.held_out()}
    where = {id: side for side, tasks in found.items() for ids in tasks.values() for id in ids}
    return {f"{e.prompt[-1].content} {e.answer}": where[id] for id, e in ws.catalog.examples(list(where)).items()}


def test_all_are_listed_with_what_they_say(ws: Workspace) -> None:
    found = quarantine.listed(ws)
    assert quarantine.rules(found) == {
        "answer-equals-question": 2,
        "contradiction": 2,
        "unknown-format": 1,
        "leakage": 1,
    }
    assert [(e["line"], e["split"]) for e in quarantine.listed(ws, rule="answer-equals-question")] == [
        (2, "held_out"),
        (1, "train"),
    ]
    assert quarantine.listed(ws, task="other") == []
    shown = quarantine.get(ws, numbers(ws)["contradiction", 3])
    assert [turn["content"] for turn in shown["messages"]] == ["How much?", "one"]
    with pytest.raises(UsageError, match="no row 999 in quarantine"):
        quarantine.get(ws, 999)


def test_a_released_row_is_taken_as_it_is_on_its_own_side(ws: Workspace) -> None:
    at = numbers(ws)
    done = quarantine.release(ws, [at["answer-equals-question", 1], at["answer-equals-question", 2]])
    assert (done.accepted, done.held_out) == (2, 1)
    assert sides(ws) == {
        "good yes": "train",
        "a A": "train",
        "b B": "held_out",
        f"{LONG}! yes": "held_out",
    }
    assert ("answer-equals-question", 1) not in numbers(ws)


def test_rows_of_several_tasks_and_sides_are_released_together(workspace: MakeWorkspace) -> None:
    """Each goes to its own."""
    ws = workspace(val_size=0.0)
    for task in ("t", "u"):
        ws.ingest(
            [row(word, word) for word in (f"{task} one", f"{task} two")],
            task=task,
            held_out=[row(f"{task} three", f"{task} three")],
        )
    listed = quarantine.listed(ws)
    done = quarantine.release(ws, [entry["number"] for entry in sorted(listed, key=lambda e: e["line"])])
    assert (done.accepted, done.held_out, done.tasks) == (6, 2, {"t": 3, "u": 3})
    waiting, held_out = ws.catalog.waiting(()), ws.catalog.held_out()
    found = {(task, "train"): len(ids) for task, ids in waiting.items()}
    found |= {(task, "held_out"): len(ids) for task, ids in held_out.items()}
    assert found == {(t, side): n for t in "tu" for side, n in (("train", 2), ("held_out", 1))}
    assert quarantine.listed(ws) == []


def test_a_released_row_is_known_when_its_file_is_read_again(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    file = ws.inbox / "t" / "rows.jsonl"
    file.parent.mkdir()

    def write(*rows: dict[str, str]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(row("a", "A"), row("b", "B"))
    assert ws.ingest().reasons == {"answer-equals-question": 2}
    quarantine.release(ws, [numbers(ws)["answer-equals-question", 1]])
    write(row("a", "A"), row("b", "B"), row("good"))
    found = ws.ingest()
    assert (found.rows, found.accepted, found.duplicates, found.quarantined) == (3, 1, 1, 1)
    assert list(numbers(ws)) == [("answer-equals-question", 2)]
    test = file.with_name("test.jsonl")
    test.write_text(json.dumps(row("a", "A")))
    assert ws.ingest().held_out == 1
    assert sides(ws) == {"a A": "held_out", "good yes": "train"}


def test_releasing_one_of_two_that_contradict_each_other_says_which_is_true(ws: Workspace) -> None:
    at = numbers(ws)
    assert quarantine.release(ws, [at["contradiction", 4]]).accepted == 1
    assert sides(ws)["How much? two"] == "train"
    done = quarantine.release(ws, [at["contradiction", 3]])
    assert (done.accepted, done.superseded) == (1, 1)
    assert "How much? two" not in sides(ws) and sides(ws)["How much? one"] == "train"


@pytest.mark.parametrize(
    ("rule", "line", "said"),
    [("leakage", 5, "what judges is never learned"), ("unknown-format", 2, "could not be read")],
)
def test_what_cannot_be_released(ws: Workspace, rule: str, line: int, said: str) -> None:
    before = sides(ws), numbers(ws)
    with pytest.raises(UsageError, match=said):
        quarantine.release(ws, [numbers(ws)["answer-equals-question", 1], numbers(ws)[rule, line]])
    assert (sides(ws), numbers(ws)) == before


def test_a_corrected_row_takes_its_place(ws: Workspace) -> None:
    at = numbers(ws)
    assert quarantine.fix(ws, at["unknown-format", 2], row("new", "right")).accepted == 1
    assert quarantine.fix(ws, at["answer-equals-question", 2], row("b", "no")).held_out == 1
    assert sides(ws)["new right"] == "train" and sides(ws)["b no"] == "held_out"
    before = numbers(ws)
    for wrong in (row("x", "x"), {"nothing": 1}, row(LONG.replace("please", "now"))):
        with pytest.raises(UsageError, match="refused"):
            quarantine.fix(ws, at["leakage", 5], wrong)
    assert numbers(ws) == before


def test_a_correction_stays_when_its_file_grows(workspace: MakeWorkspace) -> None:
    """Though the file still has the broken line, and below it what the correction made untrue."""
    ws = workspace(val_size=0.0)
    file = ws.inbox / "t" / "rows.jsonl"
    file.parent.mkdir()
    lines = [row("How much?", ""), row("other"), row("How much?", "five")]
    file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    ws.ingest()
    done = quarantine.fix(ws, numbers(ws)["no-answer", 1], row("How much?", "seven"))
    assert (done.accepted, done.superseded) == (1, 1)
    with file.open("a") as more:
        more.write(json.dumps(row("unrelated")) + "\n")
    found = ws.ingest()
    assert (found.accepted, found.restored, found.superseded) == (1, 0, 0)
    assert sides(ws) == {f"{said} yes": "train" for said in ("other", "unrelated")} | {"How much? seven": "train"}
    os.utime(file, (0, 0))
    file = file.rename(file.with_name("renamed.jsonl"))
    assert ws.ingest().accepted == 0
    assert ws.forget(where=f"file={file}").rows == 5  # Two broken or no longer true.
    assert sides(ws) == {}


def test_what_is_written_can_be_corrected_and_ingested(ws: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "refused.jsonl"
    assert quarantine.export(ws, file, rule="contradiction") == 2
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(entry["rule"], entry["line"]) for entry in rows] == [("contradiction", 3), ("contradiction", 4)]
    file.write_text(json.dumps(rows[0]) + "\n")
    assert ws.ingest(file, task="t").accepted == 1


def test_rows_held_by_the_gate_are_taken_back_one_by_one(ws: Workspace) -> None:
    corrected = quarantine.fix(ws, numbers(ws)["unknown-format", 2], row("new", "right"))
    assert corrected.accepted == 1
    before, ids = sides(ws), [id for ids in ws.catalog.waiting(()).values() for id in ids]
    with ws.catalog.writing() as writer:
        writer.set_aside(ids, "worse")
    held = list(quarantine.listed(ws, "held-by-gate"))
    assert len(held) == len(ids) and len(sides(ws)) < len(before)
    with pytest.raises(UsageError, match=f"quarantine release {held[0]['number']}"):
        quarantine.fix(ws, held[0]["number"], row("x", "y"))
    for entry in held:  # One of them, the corrected row, stands in no file.
        assert entry["messages"][-1]["content"]
        assert quarantine.release(ws, [entry["number"]]).accepted == 1
    assert sides(ws) == before and not quarantine.listed(ws, "held-by-gate")


@pytest.mark.parametrize("released", [True, False], ids=["released", "its file named"])
def test_rows_taken_back_are_judged_beside_what_came_since(
    workspace: MakeWorkspace, tmp_path: Path, released: bool
) -> None:
    ws = workspace(val_size=0.0)
    said = {f"what does the {thing} cost today?": thing for thing in ("cup", "pen", "hat", "bag")}
    file, held_out = tmp_path / "a.jsonl", tmp_path / "h.jsonl"
    file.write_text("".join(json.dumps(row(asked, f"see {thing}")) + "\n" for asked, thing in said.items()))
    held_out.write_text(json.dumps(row("and the mug?", "eight")) + "\n")
    ws.ingest(file, task="t", held_out=held_out)
    with ws.catalog.writing() as writer:
        writer.set_aside([id for ids in ws.catalog.waiting(()).values() for id in ids], "worse")
        writer.db.execute(stored_rows.update().values(given=False))
        writer.set_aside([id for ids in ws.catalog.held_out().values() for id in ids], "worse")
    assert [entry["split"] for entry in quarantine.listed(ws)] == ["train"] * 4 + ["held_out"]
    ws.ingest([], task="t", held_out=[row("What does the CUP cost today?", "see cup")])
    ws.ingest([row("what does the pen cost today?", "five"), row("What does the HAT cost today?", "see hat")], task="t")
    if released:
        taken = 0
        for entry in quarantine.listed(ws):
            with (
                nullcontext()
                if entry["line"] != 1 or entry["split"] == "held_out"
                else pytest.raises(UsageError, match="is held out and says nearly the same")
            ):
                taken += quarantine.release(ws, [entry["number"]]).accepted
    else:
        found = ws.ingest(file, task="t", held_out=held_out)
        taken = found.accepted
        assert (found.rows, found.duplicates, found.reasons) == (5, 1, {"leakage": 1})
    assert taken == 3
    assert sides(ws) == {
        "What does the CUP cost today? see cup": "held_out",
        "what does the pen cost today? see pen": "train",
        "What does the HAT cost today? see hat": "train",
        "what does the bag cost today? see bag": "train",
        "and the mug? eight": "held_out",
    }


def test_the_commands(ws: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = numbers(ws)

    def said(*arguments: str) -> str:
        assert run(["quarantine", *arguments, "-w", str(ws.root)]) == 0
        return capsys.readouterr().out

    assert "contradiction: 2\n" in said("list")
    listed: dict[str, Any] = json.loads(said("list", "--rule", "leakage", "--json"))
    assert [entry["line"] for entry in listed["rows"]] == [5]
    assert "user: How much?\nassistant: one" in said("show", str(at["contradiction", 3]))
    assert "1 accepted (0 held out)" in said("release", str(at["contradiction", 3]))
    assert "1 older rows no longer count" in said("release", str(at["contradiction", 4]))
    assert "1 accepted" in said("fix", str(at["unknown-format", 2]), json.dumps(row("new", "right")))
    assert "rows written" in said("export", str(tmp_path / "left.jsonl"))
    assert run(["quarantine", "fix", str(at["leakage", 5]), "{", "-w", str(ws.root)]) == 3
    assert "is no JSON" in capsys.readouterr().err


def set_aside(ws: Workspace) -> None:
    """All that waits, as after a hold; versions have learned it."""
    with ws.catalog.writing() as writer:
        writer.set_aside([id for ids in ws.catalog.waiting(()).values() for id in ids], "worse")


@pytest.mark.parametrize("policy", ["auto", "keep-both"])
def test_rows_that_contradict_each_other_and_were_both_set_aside(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    ws = workspace(val_size=0.0, dedup={"contradictions": policy})
    for answer in ("five", "nine"):
        ws.ingest([row("how much?", answer)], task="t")
        ids = [id for ids in ws.catalog.waiting(()).values() for id in ids]
        set_aside(ws)
    known = {*ids, *(row["id"] for row in ws.catalog.every())}
    version = SimpleNamespace(rows=known, manifest={"held_out": {}})
    monkeypatch.setattr("treering.registry.readable", lambda _: [version])
    both = [entry["number"] for entry in quarantine.listed(ws)]
    assert len(both) == 2
    if policy == "keep-both":
        found = quarantine.release(ws, both)
        assert (found.accepted, found.superseded) == (2, 0)
        return
    with pytest.raises(UsageError, match=r"the row of <python>, line 1 is refused, contradiction: .*nothing was taken"):
        quarantine.release(ws, both)
    assert len(quarantine.listed(ws)) == 2 and sides(ws) == {}
    quarantine.release(ws, both[:1])
    found = quarantine.release(ws, both[1:])
    assert (found.accepted, found.superseded) == (1, 1)
    assert sides(ws) == {"how much? nine": "train"}


def test_rows_of_one_line_that_begin_alike_are_told_apart(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws, file = workspace(val_size=0.0, cutoff_len=4096), tmp_path / "a.jsonl"
    for asked in ("where is my order?", "who are you, then?"):
        turns = [("system", "x" * 2100), ("user", asked), ("assistant", asked.split()[0])]
        file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
        assert ws.ingest(file, task="t").accepted == 1
        set_aside(ws)
    for entry in quarantine.listed(ws):
        assert quarantine.release(ws, [entry["number"]]).accepted == 1
    assert len(sides(ws)) == 2 and quarantine.listed(ws) == []


def test_a_row_of_which_another_says_the_same_needs_no_decision_any_more(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([row("how much is the cup?")], task="t")
    set_aside(ws)
    ws.ingest([row("How much is the CUP?")], task="t")
    [entry] = quarantine.listed(ws)
    found = quarantine.release(ws, [entry["number"]])
    assert (found.rows, found.accepted, found.duplicates) == (1, 0, 1)
    assert quarantine.listed(ws) == [] and len(sides(ws)) == 1
