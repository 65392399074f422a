"""What rows are to those already stored: duplicates, leakage, contradictions, over ingests and in one."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace
from treering.cli import run
from treering.data import catalog, index
from treering.data.intake import Ingested
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]

LONG = "please tell me how I can send the lamp back that I bought from you"
NEAR = LONG.replace("please ", "")


def row(question: str, answer: str = "yes") -> Mapping[str, object]:
    return {"question": question, "answer": answer}


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def balanced(found: Ingested) -> Ingested:
    assert found.rows == found.accepted + found.duplicates + found.quarantined
    assert found.accepted == sum(found.tasks.values()) and found.quarantined == sum(found.reasons.values())
    return found


def sides(ws: Workspace) -> dict[str, dict[str, str]]:
    """The answers by question, of each side."""
    found = {"train": ws.catalog.waiting(()), "held_out": ws.catalog.held_out()}
    texts = {side: ws.catalog.examples([i for ids in tasks.values() for i in ids]) for side, tasks in found.items()}
    return {
        side: {example.prompt[-1].content: example.answer for example in examples.values()}
        for side, examples in texts.items()
    }


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    return workspace(val_size=0.0)


@pytest.mark.parametrize("together", [True, False])
def test_what_says_nearly_the_same_is_left_out(ws: Workspace, together: bool) -> None:
    rows = [row(LONG), row("something else"), row(NEAR), row(LONG.upper())]
    found = [ws.ingest(part, task="a") for part in ([rows] if together else [rows[:2], rows[2:]])]
    assert sum(balanced(one).accepted for one in found) == 2
    assert (found[-1].duplicates, found[-1].near) == (2, 2)
    assert sides(ws)["train"] == {LONG: "yes", "something else": "yes"}
    again = balanced(ws.ingest(rows[::-1], task="a"))
    assert (again.accepted, again.duplicates, again.near) == (0, 4, 0)


def test_what_was_left_out_comes_in_once_nothing_stored_says_the_same(ws: Workspace, tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [row(LONG, "one"), row(NEAR, "one"), row(LONG, "two")])
    found = balanced(ws.ingest(file, task="a"))
    assert (found.accepted, found.near, found.reasons) == (0, 1, {"contradiction": 2})
    assert balanced(ws.ingest(write(file, [row(NEAR, "one")]), task="a")).accepted == 1
    assert ws.catalog.tasks()["a"] == {"train": 1}  # It counts no longer as left out.
    ws.ingest([row("How much?", "one"), row("something else")], task="a")
    assert ws.ingest([row(f"{NEAR}!", "one")], task="a").near == 1
    ws.ingest([row(NEAR, "two")], task="a")
    found = balanced(ws.ingest([row(f"{NEAR}!", "one")], task="a"))
    assert (found.duplicates, found.near) == (1, 0)  # What is no longer true is stored.


def test_numbers_and_answers_tell_rows_apart(ws: Workspace) -> None:
    rows = [row(f"{LONG}, order {number}") for number in range(5)] + [row(NEAR, "no")]
    assert balanced(ws.ingest(rows, task="a")).accepted == 6


def test_near_rows_may_be_kept_and_stay_on_one_side(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.9, dedup={"near": "keep"})
    rows = [row(LONG), row(NEAR), *(row(f"question {number}") for number in range(8))]
    found = balanced(ws.ingest(rows, task="a"))
    assert (found.accepted, found.near, found.held_out) == (10, 0, 8)
    assert sides(ws)["train"].keys() == {LONG, NEAR}


def test_leakage_is_refused(ws: Workspace) -> None:
    ws.ingest([], task="a", held_out=[row(LONG)])
    found = balanced(ws.ingest([row(NEAR), row("something else")], task="b"))
    assert found.reasons == {"leakage": 1}
    assert "is held out and says nearly the same" in found.refused[0]["reason"]
    assert sides(ws) == {"train": {"something else": "yes"}, "held_out": {LONG: "yes"}}


def talk(*said: str, system: str = "") -> Mapping[str, Any]:
    """A conversation: what the user and the assistant say in turn."""
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


SHORT = (LONG, "yes, within a month", "and who pays for that?", "we do")
GROWN = (*SHORT, "thank you", "you are welcome")
WAYS = [SHORT[:2], SHORT, (NEAR, *SHORT[1:2]), (SHORT[0].upper(), f"{SHORT[1]}!", *SHORT[2:])]
"""Conversations that the grown one goes on from, to the letter or nearly."""


@pytest.mark.parametrize("held_out", WAYS)
@pytest.mark.parametrize("rest", [(), ("what else?", "that is all")])
def test_a_longer_conversation_gives_a_held_out_one_away(
    ws: Workspace, held_out: tuple[str, ...], rest: tuple[str, ...]
) -> None:
    ws.ingest([], task="a", held_out=[talk(*held_out)])
    found = balanced(ws.ingest([talk(*GROWN, *rest), row("something else")], task="b"))
    assert (found.accepted, found.reasons) == (1, {"leakage": 1})
    assert "is held out and says nearly the same" in found.refused[0]["reason"]


@pytest.mark.parametrize("held_out", WAYS)
def test_a_held_out_row_takes_longer_conversations_out_of_training(ws: Workspace, held_out: tuple[str, ...]) -> None:
    ws.ingest([talk(*GROWN), row("something else")], task="a")
    found = balanced(ws.ingest([], task="a", held_out=[talk(*held_out)]))
    assert (found.accepted, found.withdrawn) == (1, 1)
    assert [bad["rule"] for bad in ws.catalog.quarantined()] == ["leakage"]
    assert ws.catalog.counts() == {"train": 1, "held_out": 1, "quarantined": 1}


def test_a_row_that_moves_to_the_held_out_side_takes_longer_ones_out(ws: Workspace) -> None:
    ws.ingest([talk(*SHORT), talk(*GROWN)], task="a")
    assert ws.catalog.counts()["train"] == 2
    found = balanced(ws.ingest([], task="a", held_out=[talk(*SHORT)]))
    assert (found.accepted, found.withdrawn) == (1, 1)
    assert ws.catalog.counts() == {"train": 0, "held_out": 1, "quarantined": 1}


def test_a_held_out_row_that_a_longer_conversation_has_taught_is_refused(ws: Workspace) -> None:
    rows = [talk(*GROWN), talk(*SHORT), *(row(f"question {number}") for number in range(4))]
    ws.ingest(rows, task="a")
    ws.update(max_steps=1, gate={"floor": 1.0, "margin": 1.0})
    found = balanced(ws.ingest([], task="a", held_out=[talk(*SHORT[:2])]))
    assert found.reasons == {"held-out-was-trained": 1}


def test_what_is_asked_on_the_way_and_not_learned_gives_nothing_away(ws: Workspace) -> None:
    ws.ingest([], task="a", held_out=[talk(*SHORT[:2]), talk(*GROWN, "one more?", "no")])
    read: Any = talk(*GROWN)
    read["messages"][1]["weight"] = 0
    other = talk(LONG, "no, never", *SHORT[2:])
    shorter = talk(*SHORT[2:], "what of the last answer of a longer one?", "it is not in here")
    found = balanced(ws.ingest([read, other, shorter], task="a"))
    assert (found.accepted, found.near, found.reasons) == (3, 0, {})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("at_once", [11, 6])
def test_a_conversation_that_grows_stays_on_one_side(workspace: MakeWorkspace, seed: int, at_once: int) -> None:
    ws = workspace(val_size=0.9)
    family = [talk(*GROWN[:2]), talk(*GROWN), talk(NEAR, *GROWN[1:4])]
    rows = [*family, *(talk(f"question {number}", "yes", "and?", "no") for number in range(8))]
    random.Random(seed).shuffle(rows)
    for start in range(0, len(rows), at_once):
        balanced(ws.ingest(rows[start : start + at_once], task="a"))
    said = {
        side: [[turn.content for turn in example.messages] for example in ws.catalog.examples(ids).values()]
        for side, ids in (("held_out", ws.catalog.held_out()["a"]), ("train", ws.catalog.waiting(()).get("a", [])))
    }
    held_out, trained = ([turns for turns in said[side] if turns[0] in (LONG, NEAR)] for side in ("held_out", "train"))
    assert not any(longer[1 : len(turns)] == turns[1:] for turns in held_out for longer in trained)
    assert at_once < len(rows) or (len(held_out), len(trained), len(said["held_out"])) == (0, 3, 8)


def test_a_held_out_row_takes_its_likes_out_of_training(ws: Workspace) -> None:
    ws.ingest([row(NEAR), row("something else")], task="a")
    found = balanced(ws.ingest([], task="a", held_out=[row(LONG)]))
    assert (found.accepted, found.quarantined, found.withdrawn) == (1, 0, 1)  # It came with another ingest.
    assert sides(ws) == {"train": {"something else": "yes"}, "held_out": {LONG: "yes"}}
    assert [bad["rule"] for bad in ws.catalog.quarantined()] == ["leakage"]


def test_a_held_out_row_whose_like_was_learned_is_refused(ws: Workspace) -> None:
    ws.ingest([row(NEAR), *(row(f"question {number}") for number in range(4))], task="a")
    ws.update(max_steps=1, gate={"floor": 1.0, "margin": 1.0})
    found = balanced(ws.ingest([], task="a", held_out=[row(LONG), row("another")]))
    assert (found.accepted, found.reasons) == (1, {"held-out-was-trained": 1})
    assert ", line 1, which says nearly the same" in found.refused[0]["reason"]
    assert NEAR in sides(ws)["train"]


def test_contradictions_of_one_ingest_all_go_to_quarantine(ws: Workspace) -> None:
    rows = [row("How much?", "one"), row("else"), row("how much", "two"), row("how much?", "three")]
    found = balanced(ws.ingest(rows, task="a"))
    assert (found.accepted, found.reasons) == (1, {"contradiction": 3})
    assert sides(ws)["train"] == {"else": "yes"}
    refused = {bad["line"]: bad["reason"] for bad in ws.catalog.quarantined()}
    assert refused.keys() == {1, 3, 4}
    assert "<python>, line 3, answers the same with something else" in refused[1]
    assert not any(repr(said) in reason for reason in refused.values() for said in ("one", "two", "three"))
    assert balanced(ws.ingest([row("how much", "four")], task="a")).accepted == 1  # Nothing stored speaks against it.


def test_contradictions_over_batches_of_one_ingest(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treering.data.check.PART", 2)
    rows = [row("How much?", "one"), row("else"), row("how much", "two"), row(LONG), row("how much?", "3"), row(NEAR)]
    found = balanced(ws.ingest(rows, task="a"))
    assert (found.accepted, found.duplicates, found.reasons) == (2, 1, {"contradiction": 3})
    assert sides(ws)["train"] == {"else": "yes", LONG: "yes"}


def test_a_newer_answer_supersedes_an_older_one(ws: Workspace) -> None:
    old, new = row("How much is the lamp?", "one"), row("how much is the lamp", "two")
    ws.ingest([old, row("else")], task="a")
    found = balanced(ws.ingest([new], task="a"))
    assert (found.accepted, found.superseded) == (1, 1)
    assert sides(ws)["train"] == {"else": "yes", "how much is the lamp": "two"}
    again = balanced(ws.ingest([old, new], task="a"))  # The old file read once more changes nothing.
    assert (again.accepted, again.duplicates) == (0, 2)
    assert sides(ws)["train"]["how much is the lamp"] == "two"


@pytest.mark.parametrize(
    ("policy", "together", "kept", "quarantined"),
    [
        ("keep-both", False, {"one", "two"}, 0),
        ("keep-both", True, {"one", "two"}, 0),
        ("quarantine", False, {"one"}, 1),
        ("supersede", False, {"two"}, 0),
        ("supersede", True, {"two"}, 1),
        ({"a": "keep-both", "*": "quarantine"}, False, {"one", "two"}, 0),
        ({"b": "keep-both", "*": "quarantine"}, False, {"one"}, 1),
        ({"b": "keep-both"}, False, {"two"}, 0),
    ],
)
def test_a_task_has_a_policy(
    workspace: MakeWorkspace, policy: Any, together: bool, kept: set[str], quarantined: int
) -> None:
    ws = workspace(val_size=0.0, dedup={"contradictions": policy})
    rows = [row("How much?", "one"), row("How much?", "two")]
    for part in [rows] if together else [rows[:1], rows[1:]]:
        balanced(ws.ingest(part, task="a"))
    ids = [id for ids in ws.catalog.waiting(()).values() for id in ids]
    assert {example.answer for example in ws.catalog.examples(ids).values()} == kept
    assert ws.catalog.counts()["quarantined"] == quarantined


def test_tasks_that_empty_each_other_are_named(
    workspace: MakeWorkspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is told to do about it does."""
    ws = workspace(val_size=0.2)
    texts = [f"question {word} of number {n}" for n, word in enumerate("abcdefghij")]
    for task, answer in (("topic", "trade"), ("mood of it", "glad")):
        file = write(tmp_path / f"{task}.jsonl", [row(text, answer) for text in texts])
        assert run(["ingest", str(file), "--task", task, "-w", str(ws.root)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "NO LONGER COUNT" in line]
    setting = 'dedup: {contradictions: {"topic": keep-both, "mood of it": keep-both}}'
    assert said == [
        "  10 older rows of topic (2 of them held out) NO LONGER COUNT, for rows of mood of it answer the same with "
        f"something else; where both are true, set {setting} and ingest the rows of topic once more, from a file of "
        "another name"
    ]
    assert ws.catalog.tasks()["topic"] == {"superseded": 10}
    with (ws.root / "treering.yaml").open("a") as settings:
        settings.write(setting + "\n")
    found = balanced(ws.ingest(shutil.copy(tmp_path / "topic.jsonl", tmp_path / "again.jsonl"), task="topic"))
    assert (found.accepted, found.restored, found.replaced) == (10, 10, [])
    counts = ws.catalog.tasks()
    assert {task: (of["train"], of["held_out"]) for task, of in counts.items()} == {
        "topic": (8, 2),
        "mood of it": (8, 2),
    }


def test_held_out_rows_that_are_superseded_are_named(
    ws: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ws.ingest([row("one", "1"), row("two", "1")], task="a", held_out=[row("three", "1")])
    for number, asked in enumerate([["one"], ["two", "three"]]):
        file = write(tmp_path / f"{number}.jsonl", [row(text, "2") for text in asked])
        assert run(["ingest", str(file), "--task", "a", "-w", str(ws.root)]) == 0
    said = [line.strip() for line in capsys.readouterr().out.splitlines() if "no longer count" in line]
    why = "no longer count: newer ones answer the same with something else"
    keep = 'dedup: {contradictions: {"a": keep-both}} would keep both'
    assert said == [f"1 older row of a {why}", f"2 older rows of a (1 of them held out) {why}; {keep}"]


def test_what_is_superseded_leaves_memory_and_scores(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0, memory={"size": 100}, recall={"fallback": False})
    ws.ingest(toy_rows("a", 12), task="a", held_out=[row(f"a held question {n}", "a b") for n in range(4)])
    first = ws.update(max_steps=1, gate={"floor": 1.0, "margin": 1.0})
    assert first is not None and first.promote
    learned, judged = first.rows[0], first.manifest["held_out"]["a"][0]
    texts = ws.catalog.examples([learned, judged])
    ws.ingest([row(texts[learned].prompt[-1].content, "a z"), row(texts[judged].prompt[-1].content, "a z")], task="a")
    second = ws.update(max_steps=1, gate={"floor": 1.0, "margin": 1.0})
    assert second is not None
    memory = (second.folder / "memory.json").read_text()
    assert learned in (first.folder / "memory.json").read_text() and learned not in memory
    assert judged not in second.manifest["held_out"]["a"] and len(second.manifest["held_out"]["a"]) == 3
    assert all(line in memory for line in second.rows)


def test_where_the_catalog_was_lost_what_versions_know_is_kept(workspace: MakeWorkspace) -> None:
    rows = [row("How much?", "one"), row("How much?", "two"), row(LONG), row(NEAR), *toy_rows("a", 8)]
    ws = workspace(val_size=0.3, dedup={"near": "keep", "contradictions": "keep-both"})
    ws.ingest(rows, task="a")
    version = ws.update(max_steps=1, gate={"floor": 1.0, "margin": 1.0})
    assert version is not None and version.promote
    for file in ws.root.glob("treering.db*"):
        file.unlink()
    (ws.root / "treering.yaml").write_text((ws.root / "treering.yaml").read_text().partition("dedup")[0])
    ws = Workspace(ws.root)
    found = balanced(ws.ingest([*rows, row("How much?", "three")], task="a"))
    assert found.reasons == {"contradiction": 1} and found.accepted == 12
    needed = [*version.rows, *version.manifest["held_out"]["a"]]
    assert len(ws.catalog.examples(needed)) == 12


def words_known(ws: Workspace) -> dict[str, tuple[int, set[str]]]:
    """How many rows of each task have had their words counted, and the words."""
    with sqlite3.connect(ws.root / "treering.db") as db:
        found = db.execute("SELECT task, rows, counts FROM words").fetchall()
    db.close()
    return {task: (count, set(json.loads(counts))) for task, count, counts in found}


def test_words_of_stored_rows_alone_are_known(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0, checks={"look-alike-label": "reject"})
    kept = [row("kept alpha beta"), row("kept gamma", "no")]
    left_out = row(f"{LONG} zanzibar")
    disputed = [write(tmp_path / f"{said}.jsonl", [row("which quagga", said)]) for said in ("one", "two")]
    found = balanced(ws.ingest([write(tmp_path / "rows.jsonl", [*kept, row(LONG), left_out]), *disputed], task="a"))
    assert (found.accepted, found.near, found.quarantined) == (3, 1, 2)
    count, known = words_known(ws)["a"]
    assert count == 3 and {"alpha", "lamp"} <= known and not {"zanzibar", "quagga"} & known
    ws.ingest([row("which quagga", "one")], task="a")
    ws.ingest([row("which quagga", "two")], task="a")  # What is superseded is stored.
    assert words_known(ws)["a"][0] == 5
    ws.ingest([row(f"{NEAR} xebec")], task="b")
    assert words_known(ws)["b"][0] == 0  # Nearly the same is stored in the other task.
    ws.ingest([], task="b", held_out=[row(f"{NEAR} yacht"), row("kept gamma", "no")])
    assert ws.catalog.tasks() == {
        "a": {"train": 2, "superseded": 1, "left_out": 1, "quarantined": 3},
        "b": {"held_out": 2, "left_out": 1},
    }
    with ws.catalog.writing() as writer:
        indexed = [seq for run in index.Index(writer.index, writer.runs()[0]).runs for seq in run.rows]
    with sqlite3.connect(ws.root / "treering.db") as db:
        assert sorted(indexed) == [seq for (seq,) in db.execute("SELECT seq FROM rows ORDER BY seq")]
    db.close()
    a, b = words_known(ws)["a"], words_known(ws)["b"]
    assert (a[0], b[0]) == (3, 2) and {"gamma", "yacht"} <= b[1] and not {"gamma", "please", "xebec"} & a[1]
    many = [row(f"{word} labels", "refund") for word in "abcdefghijklmnopqrst"]
    assert ws.ingest([*many, row("mandrill", "Refund")], task="c").reasons == {"look-alike-label": 1}
    assert words_known(ws)["c"][0] == 20 and "mandrill" not in words_known(ws)["c"][1]
    ws.forget(where="file~python")
    ws.forget(where="file~jsonl")
    assert words_known(ws) == dict.fromkeys("abc", (0, set()))


@pytest.mark.parametrize("lost", ["index", "run", "file"])
def test_a_lost_index_is_made_again(ws: Workspace, lost: str) -> None:
    ws.ingest([row(LONG), row("something else")], task="a")
    ws.ingest([row("one more")], task="a")
    folder = ws.root / catalog.INDEX
    run = next(folder.iterdir())
    if lost == "file":
        (run / "keys.npy").write_bytes(b"")
    else:
        shutil.rmtree(folder if lost == "index" else run)
    found = balanced(ws.ingest([row(NEAR)], task="a"))
    assert (found.accepted, found.near) == (0, 1)


def test_a_failed_ingest_leaves_no_run(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    ws.ingest([row(LONG)], task="a")
    before = sorted(path.name for path in (ws.root / catalog.INDEX).iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("treering.data.writer.Writer.keep_runs", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ws.ingest([row("something else entirely")], task="a")
    assert balanced(ws.ingest([row(NEAR)], task="a")).near == 1
    with ws.catalog.writing() as writer:
        names, upto = writer.runs()
    index.clear(ws.root / catalog.INDEX, names)
    assert (sorted(path.name for path in (ws.root / catalog.INDEX).iterdir()), upto) == (before, 2)


def test_a_catalog_of_before_is_brought_up_to_date(ws: Workspace, workspace: MakeWorkspace) -> None:
    ws.ingest([row(LONG), row("How much?", "one"), row("x", "x")], task="a")
    del ws.catalog
    with sqlite3.connect(ws.root / "treering.db") as db:
        db.execute("DROP INDEX ix_rows_asked")
        db.execute("ALTER TABLE rows DROP COLUMN asked")
        db.execute("ALTER TABLE quarantine DROP COLUMN messages")
        db.execute("ALTER TABLE quarantine DROP COLUMN split")
        for table in ("duplicates", "runs", "words"):
            db.execute(f"DROP TABLE {table}")
        db.execute("ALTER TABLE meta DROP COLUMN root")
        db.execute("UPDATE meta SET schema = 1")
    db.close()
    shutil.rmtree(ws.root / catalog.INDEX)
    found = balanced(Workspace(ws.root).ingest([row(NEAR), row("how much?", "two")], task="a"))
    assert (found.accepted, found.near, found.superseded) == (1, 1, 1)
    assert Workspace(ws.root).catalog.counts() == {"train": 2, "held_out": 0, "quarantined": 1}


def test_many_rows_and_their_likes(ws: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("treering.data.check.PART", 100)
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(500)]
    texts = [" ".join(draw.sample(words, 15)) for _ in range(400)]
    near = [" ".join([*text.split()[1:], "please"]) for text in texts[:100]]
    rows = [row(text) for text in [*texts, *near]]
    draw.shuffle(rows)
    found = [balanced(ws.ingest(rows[start : start + 250], task="a")) for start in (0, 250)]
    assert sum(one.near for one in found) >= 97
    assert sum(one.accepted for one in found) == 500 - sum(one.near for one in found)
