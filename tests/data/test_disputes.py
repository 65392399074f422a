"""Contradictions over time: what is said anew counts, what is merely read again does not."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace, overview
from treering.data import quarantine
from treering.data.intake import Ingested
from treering.data.stats import stats
from treering.memory import Memory

MakeWorkspace = Callable[..., Workspace]
Say = Callable[..., Ingested]

QUESTION = "price of tea"


def row(answer: str, question: str = QUESTION) -> dict[str, str]:
    return {"question": question, "answer": answer}


def balanced(found: Ingested) -> Ingested:
    assert found.rows == found.accepted + found.duplicates + found.quarantined
    assert found.accepted == sum(found.tasks.values()) and found.quarantined == sum(found.reasons.values())
    return found


def held(ws: Workspace) -> dict[str, str]:
    """The side of each answer to the question."""
    with sqlite3.connect(ws.root / "treering.db") as db:
        found = db.execute("SELECT messages, split FROM rows").fetchall()
    db.close()
    rows = [(json.loads(messages), split) for messages, split in found]
    return {turns[-1]["content"]: split for turns, split in rows if turns[0]["content"] == QUESTION}


def true(ws: Workspace) -> set[str]:
    return {answer for answer, split in held(ws).items() if split in ("train", "held_out")}


def disputed(ws: Workspace) -> list[str]:
    """What is in quarantine, as `FILE: ANSWER`."""
    found = quarantine.listed(ws, rule="contradiction")
    return sorted(f"{Path(entry['file']).stem}: {entry['messages'][-1]['content']}" for entry in found)


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    return workspace(val_size=0.0)


@pytest.fixture
def say(ws: Workspace) -> Say:
    """Write these answers to files of the inbox, line by line, and ingest; one that is no answer is another row."""

    def write(**files: str) -> Ingested:
        for name, answers in files.items():
            path = ws.inbox / "t" / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            rows = [row(one) if one.isdigit() else row("yes", f"what of {one}") for one in answers.split()]
            path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return balanced(ws.ingest())

    return write


# Said anew


def test_a_value_that_changes_back_is_true_again(ws: Workspace, say: Say) -> None:
    for file, answer in (("one", "10"), ("two", "12"), ("three", "10"), ("four", "12"), ("five", "10")):
        found = say(**{file: answer})
        assert (found.accepted, found.superseded, true(ws)) == (1, int(file != "one"), {answer})
        assert found.restored == (file not in ("one", "two"))
    [id] = ws.catalog.waiting(())["t"]
    [stored] = ws.catalog.rows([id])
    assert (Path(stored["file"]).stem, stored["line"]) == ("five", 1)
    assert held(ws) == {"10": "train", "12": "superseded:train"}


def test_a_file_that_is_read_again_says_nothing_new(ws: Workspace, say: Say) -> None:
    say(one="x 10")
    say(two="12")
    assert say(one="x 10 y").duplicates == 2
    assert say(two="12 z").duplicates == 1
    assert true(ws) == {"12"}
    say(three="10")
    assert (say(two="12 z w").accepted, true(ws)) == (1, {"10"})


def test_an_unchanged_file_that_is_named_again_says_nothing_new(ws: Workspace, say: Say) -> None:
    """Though the row is stored with another file that says the same."""
    say(one="10")
    say(two="x 10")
    say(three="12")
    assert ws.ingest(ws.inbox / "t" / "two.jsonl", task="t").duplicates == 2
    assert (true(ws), say(two="x 10 12 10").restored, true(ws)) == ({"12"}, 1, {"10"})


def test_a_moved_workspace_says_nothing_new(ws: Workspace, say: Say, tmp_path: Path) -> None:
    """Nor does a copy of it, nor a file that was renamed; whatever its files are called, each is itself."""
    say(one="x 10", two="y")
    say(three="12")
    before = held(ws)
    ws.catalog.engine.dispose()
    shutil.copytree(ws.root, tmp_path / "copied")
    moved = Workspace(ws.root.rename(tmp_path / "moved_%"))
    one = moved.inbox / "t" / "one.jsonl"
    os.utime(one, (1e9, 1e9))  # Before it was ingested, to the second.
    one.rename(one.with_name("old.jsonl"))
    copied = Workspace(tmp_path / "copied")
    assert (moved.ingest().duplicates, copied.ingest().rows) == (2, 0)
    (copied.inbox / "t" / "four.jsonl").write_text(json.dumps(row("yes", "what else")))
    assert copied.ingest().accepted == 1
    for here in (moved, copied):
        assert (true(here), held(here)) == ({"12"}, before)
        with sqlite3.connect(here.root / "treering.db") as db:
            names = {name for (name,) in db.execute("SELECT file FROM rows UNION SELECT path FROM files")}
        db.close()
        assert names == {str(file) for file in here.inbox.rglob("*.jsonl")}
    grown = moved.inbox / "t" / "old.jsonl"
    grown.write_text(grown.read_text() + json.dumps(row("yes", "what else")) + "\n")
    assert (moved.ingest().accepted, true(moved)) == (1, {"12"})


def test_a_new_file_with_what_one_had_that_is_gone_says_it_anew(ws: Workspace, say: Say) -> None:
    say(one="10")
    (ws.inbox / "t" / "one.jsonl").unlink()
    say(two="12")
    assert (say(three="10").restored, true(ws)) == (1, {"10"})


def test_a_file_may_be_edited_in_place(ws: Workspace, say: Say) -> None:
    for answers, answer in (("x 10", "10"), ("x 12", "12"), ("x 10", "10"), ("x 10 y", "10"), ("x y 12", "12")):
        say(one=answers)
        assert true(ws) == {answer}


def test_of_a_file_that_says_both_the_last_counts(ws: Workspace, say: Say) -> None:
    say(one="10")
    say(two="12")
    assert (say(three="10 12").duplicates, true(ws)) == (2, {"12"})
    assert (say(four="12 10").restored, true(ws)) == (1, {"10"})


def test_a_file_may_be_a_log(ws: Workspace, say: Say) -> None:
    say(log="10")
    say(log="12")
    assert (say(log="12 10").restored, true(ws)) == (1, {"10"})
    assert (say(log="12 10 x").duplicates, true(ws)) == (2, {"10"})
    assert (say(log="10 12 x").restored, true(ws)) == (1, {"12"})
    assert (say(log="y 10 12 x").duplicates, true(ws)) == (3, {"12"})


def test_rows_from_python_are_of_one_file(ws: Workspace) -> None:
    for answer in ("10", "12", "10", "12"):
        assert balanced(ws.ingest([row(answer)], task="t")).accepted == 1
        assert true(ws) == {answer}
    found = balanced(ws.ingest([row("10"), row("12")], task="t"))  # What is true comes last.
    assert (found.duplicates, true(ws)) == (2, {"12"})


def test_one_that_is_near_a_held_out_row_or_another_stays_superseded(ws: Workspace) -> None:
    long = "please tell me what I have to pay for a pound of the best black tea"

    def ask(answer: str, text: str = long) -> Ingested:
        return ws.ingest([row(answer, text)], task="t")

    ask("10")
    ask("12")
    ask("10", long.replace("please ", ""))
    for _ in range(2):
        found = balanced(ask("10"))
        assert (found.accepted, found.near, found.superseded) == (0, 1, 0)
    ws.ingest([], task="t", held_out=[row("10", long.replace("the ", ""))])
    assert balanced(ask("10")).reasons == {"leakage": 1}


@pytest.mark.parametrize(
    ("policy", "last", "kept"),
    [("keep-both", "accepted", {"10", "12"}), ("quarantine", "quarantined", {"12"}), ("supersede", "accepted", {"10"})],
)
def test_a_policy_says_what_becomes_of_it(ws: Workspace, say: Say, policy: str, last: str, kept: set[str]) -> None:
    say(one="10")
    say(two="12")
    settings = ws.root / "treering.yaml"
    settings.write_text(settings.read_text() + f"\ndedup: {{contradictions: {policy}}}\n")
    assert getattr(say(three="10"), last) == 1
    assert true(ws) == kept


@pytest.mark.parametrize("other", ["four", "zero"])
def test_nobody_knows_of_two_that_come_together(ws: Workspace, say: Say, other: str) -> None:
    say(one="10")
    say(two="12")
    found = say(**{"three": "10", other: "14"})  # In the order of their names.
    assert (found.accepted, found.restored, found.reasons) == (0, 0, {"contradiction": 2})
    assert disputed(ws) == sorted([f"{other}: 14", "three: 10"])
    assert held(ws)["10"] == "superseded:train" and "14" not in held(ws)
    assert (say(two="x", five="12").restored, true(ws)) == (1, {"12"})
    number = next(entry["number"] for entry in quarantine.listed(ws) if entry["messages"][-1]["content"] == "10")
    done = quarantine.release(ws, [number])
    assert (done.accepted, done.restored, true(ws)) == (1, 1, {"10"})


def test_what_was_held_out_is_held_out_again(ws: Workspace) -> None:
    ws.ingest([], task="t", held_out=[row("10")])
    ws.ingest([row("12")], task="t")
    found = balanced(ws.ingest([row("10")], task="t"))
    assert (found.held_out, held(ws)) == (1, {"10": "held_out", "12": "superseded:train"})


def test_what_was_learned_does_not_judge_when_it_is_said_anew(ws: Workspace) -> None:
    others = [row("yes", f"what of {name}") for name in "abcd"]
    ws.ingest([row("10"), *others], task="t")
    ws.update(max_steps=1, gate={"floor": 1.0, "margin": 1.0})
    ws.ingest([row("12")], task="t")
    assert balanced(ws.ingest([], task="t", held_out=[row("10")])).reasons == {"held-out-was-trained": 1}
    assert true(ws) == {"12"}
    assert (balanced(ws.ingest([row("10")], task="t")).restored, true(ws)) == (1, {"10"})


def test_it_is_learned_again_by_who_learned_the_other_since(ws: Workspace) -> None:
    others = [row("yes", f"what of {name}") for name in "abcd"]
    settings: dict[str, Any] = {"max_steps": 1, "gate": {"floor": 1.0, "margin": 1.0}, "memory": {"size": 100}}

    def waiting() -> dict[str, int]:
        found: dict[str, int] = overview.status(ws)["waiting"]
        return found

    ws.ingest([row("10"), *others], task="t")
    first = ws.update(**settings)
    ws.ingest([row("12")], task="t")
    ws.ingest([row("10")], task="t")
    assert waiting() == {}  # Nobody has learned anything else.
    ws.ingest([row("12")], task="t")
    second = ws.update(**settings)
    assert waiting() == {}
    ws.ingest([row("10")], task="t")
    assert waiting() == {"t": 1} and stats(ws)["t"]["rows"]["waiting"] == 1
    third = ws.update(**settings)
    assert first is not None and second is not None and third is not None
    [ten] = third.rows
    assert ten in first.rows and not third.problems()
    assert ten in Memory.load(third.folder).rows and second.rows[0] not in Memory.load(third.folder).rows
    assert waiting() == {} and ws.update(**settings) is None
    ws.rollback()
    assert waiting() == {"t": 1}
    ws.rollback()
    assert waiting() == {}  # It knows the first answer, and nothing else.


# In quarantine


def test_a_dispute_is_not_settled_by_a_file_that_grows(ws: Workspace, say: Say) -> None:
    assert say(one="10", two="12").reasons == {"contradiction": 2}
    for files in ({"one": "10 x"}, {"two": "12 y"}, {"one": "z 10 x", "two": "12 y w"}):
        found = say(**files)
        assert (found.reasons, true(ws)) == ({"contradiction": len(files)}, set())
        assert disputed(ws) == ["one: 10", "two: 12"]
    [reason] = [entry["reason"] for entry in quarantine.listed(ws) if entry["file"].endswith("one.jsonl")]
    assert "two.jsonl, line 1, answers the same with something else" in reason


def test_it_is_settled_where_nobody_else_is_left(ws: Workspace, say: Say) -> None:
    say(one="10", two="12")
    assert say(two="x").accepted == 1  # Its row is gone.
    assert (say(one="10 y").accepted, true(ws)) == (2, {"10"})
    assert disputed(ws) == []


def test_it_is_settled_by_two_files_at_once(ws: Workspace, say: Say) -> None:
    say(one="10", two="12")
    assert (say(one="10 y", two="x").accepted, true(ws)) == (3, {"10"})


def test_who_was_released_is_right(ws: Workspace, say: Say) -> None:
    say(one="10", two="12")
    [ten] = [e["number"] for e in quarantine.listed(ws) if e["messages"][-1]["content"] == "10"]
    quarantine.release(ws, [ten])
    found = say(one="10 x", two="12 y")
    assert (found.duplicates, found.reasons, true(ws)) == (1, {"contradiction": 1}, {"10"})
    [twelve] = [e["number"] for e in quarantine.listed(ws)]
    quarantine.release(ws, [twelve])
    assert (say(one="10 x z").duplicates, say(two="12 y w").duplicates, true(ws)) == (2, 2, {"12"})


def test_who_was_released_last_is_right(ws: Workspace, say: Say) -> None:
    say(one="10 12")
    for answer in ("12", "10"):
        [number] = [e["number"] for e in quarantine.listed(ws) if e["messages"][-1]["content"] == answer]
        quarantine.release(ws, [number])
    assert (say(one="x 10 12 y").duplicates, true(ws)) == (2, {"10"})


def test_another_file_says_which_is_true(ws: Workspace, say: Say) -> None:
    say(one="10", two="12")
    assert (say(three="12").accepted, true(ws)) == (1, {"12"})
    assert (say(one="10 x").reasons, true(ws)) == ({"contradiction": 1}, {"12"})


@pytest.mark.parametrize(("policy", "kept"), [("keep-both", {"10", "12"}), ("supersede", {"10"})])
def test_another_policy_settles_it(ws: Workspace, say: Say, policy: Any, kept: set[str]) -> None:
    say(one="10", two="12")
    settings = ws.root / "treering.yaml"
    settings.write_text(settings.read_text() + f"\ndedup: {{contradictions: {policy}}}\n")
    say(one="10 x")
    say(two="12 y")
    assert true(ws) == kept


def test_the_later_of_one_file_stays_where_it_supersedes(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0, dedup={"contradictions": "supersede"})
    path = ws.inbox / "t" / "one.jsonl"
    path.parent.mkdir()
    lines = [json.dumps(row("10")) + "\n", json.dumps(row("12")) + "\n", json.dumps(row("yes", "what of x")) + "\n"]
    path.write_text("".join(lines[:2]))
    assert balanced(ws.ingest()).reasons == {"contradiction": 1}
    path.write_text("".join(lines))
    found = balanced(ws.ingest())
    assert (found.accepted, found.duplicates, found.reasons) == (1, 1, {"contradiction": 1})
    assert (true(ws), disputed(ws)) == ({"12"}, ["one: 10"])
