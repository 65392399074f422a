"""Rows on their way into the catalog: none lost, none twice, none on both sides, all or nothing."""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering import Workspace, overview, registry
from treering.data.intake import Ingested, ingest
from treering.data.writer import Writer, choose_held_out
from treering.errors import ConfigError, LockError, TreeringError, UsageError
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]
Rows = Sequence[Mapping[str, object]]


def write(path: Path, rows: Rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(number: int, answer: str = "yes") -> dict[str, object]:
    return {"text": f"question {number}", "label": answer}


def balanced(found: Ingested) -> bool:
    return (
        found.rows == found.accepted + found.duplicates + found.quarantined
        and found.accepted == sum(found.tasks.values())
        and found.quarantined == sum(found.reasons.values())
        and found.held_out <= found.accepted
    )


def stored(ws: Workspace) -> dict[str, tuple[str, str]]:
    """Task and side of each row, by its question."""
    sides = {"train": ws.catalog.waiting(()), "held_out": ws.catalog.held_out()}
    where = {id: (task, side) for side, tasks in sides.items() for task, ids in tasks.items() for id in ids}
    return {found.prompt[-1].content: where[id] for id, found in ws.catalog.examples(list(where)).items()}


def learn(ws: Workspace) -> None:
    version = ws.update(max_steps=1, gate={"floor": 1.0, "margin": 1.0})
    assert version is not None


def test_counts_add_up(workspace: MakeWorkspace) -> None:
    ws = workspace()
    rows: list[Mapping[str, object]] = [row(n) for n in range(10)]
    found = ws.ingest([*rows, row(3), {"text": ""}, {"nothing": 1}, row(4), {"text": "x", "label": "x"}], task="a")
    assert (found.rows, found.accepted, found.duplicates, found.quarantined, found.held_out) == (15, 10, 2, 3, 1)
    assert balanced(found)
    assert found.tasks == {"a": 10}
    assert ws.catalog.counts() == {"train": 9, "held_out": 1, "quarantined": 3}
    assert [bad["line"] for bad in ws.catalog.quarantined()] == [12, 13, 15]
    assert found.as_dict()["rows"] == 15
    assert [(bad["file"], bad["line"], bad["rule"]) for bad in found.refused] == [
        ("<python>", 12, "no-answer"),
        ("<python>", 13, "unknown-format"),
        ("<python>", 15, "answer-equals-question"),
    ]


@pytest.fixture
def lost(workspace: MakeWorkspace) -> tuple[Workspace, set[str], set[str]]:
    """A workspace whose catalog was lost after v1, and what v1 had learned and was judged by."""
    ws = workspace(val_size=0.3)
    ws.ingest(toy_rows("a", 20), task="a")
    learn(ws)
    [version] = registry.versions(ws)
    for file in ws.root.glob("treering.db*"):
        file.unlink()
    return Workspace(ws.root), set(version.rows), set(version.manifest["held_out"]["a"])


def test_a_new_catalog_keeps_the_sides_that_versions_know(lost: tuple[Workspace, set[str], set[str]]) -> None:
    ws, learned, judged = lost
    ws.ingest(toy_rows("a", 40), task="a")
    held_out = set(ws.catalog.held_out()["a"])
    assert judged < held_out and not held_out & learned
    assert len(held_out) == 12  # The share of all forty.
    assert not judged & {id for ids in ws.catalog.waiting(()).values() for id in ids}


def test_a_new_catalog_holds_out_nothing_that_was_learned(lost: tuple[Workspace, set[str], set[str]]) -> None:
    ws, learned, judged = lost
    found = ws.ingest(toy_rows("a", 40)[20:], task="a", held_out=toy_rows("a", 20))
    assert found.reasons == {"held-out-was-trained": len(learned)}
    assert set(ws.catalog.held_out()["a"]) == judged


def test_again_adds_nothing(workspace: MakeWorkspace) -> None:
    ws = workspace()
    path = write(ws.inbox / "a" / "rows.jsonl", [*(row(n) for n in range(10)), {"text": ""}])
    first = ws.ingest()
    before = stored(ws)
    assert (first.accepted, first.quarantined) == (10, 1)
    assert ws.ingest() == Ingested()  # The inbox's files are known.
    again = ws.ingest(path, task="a")  # A file that is named is read.
    assert (again.rows, again.accepted, again.duplicates, again.quarantined) == (11, 0, 10, 1)
    assert balanced(again)
    copied = ws.ingest(write(ws.inbox / "a" / "copy.jsonl", [row(n) for n in range(10)]))
    assert (copied.accepted, copied.duplicates) == (0, 10)
    assert stored(ws) == before
    assert ws.catalog.counts()["quarantined"] == 1


def test_a_file_that_grew_is_read_again(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    write(ws.inbox / "a" / "rows.jsonl", [row(0), {"text": ""}])
    ws.ingest()
    write(ws.inbox / "a" / "rows.jsonl", [row(0), row(1)])
    found = ws.ingest()
    assert (found.accepted, found.duplicates, found.quarantined) == (1, 1, 0)
    assert ws.catalog.counts() == {"train": 2, "held_out": 0, "quarantined": 0}


def test_quarantined_rows_from_python_stay(workspace: MakeWorkspace) -> None:
    """Rows without a file have no later content that could replace them."""
    ws = workspace()
    for text in ("one", "two"):
        ws.ingest([{"text": text, "label": text}], task="a")
    assert [bad["rule"] for bad in ws.catalog.quarantined()] == ["answer-equals-question"] * 2


def test_a_row_belongs_to_one_task(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    write(ws.inbox / "a" / "rows.jsonl", [row(1), row(2)])
    write(ws.inbox / "b" / "rows.jsonl", [row(2), row(3)])
    found = ws.ingest()
    assert (found.accepted, found.duplicates, found.tasks) == (3, 1, {"a": 2, "b": 1})
    again = ws.ingest([row(1), row(4)], task="b")
    assert (again.accepted, again.duplicates) == (1, 1)
    assert {question: task for question, (task, _) in stored(ws).items()} == {
        **{"question 1": "a", "question 2": "a"},
        **{"question 3": "b", "question 4": "b"},
    }


def test_held_out_wins_whatever_the_order(workspace: MakeWorkspace) -> None:
    ws = workspace()
    write(ws.inbox / "a" / "train.jsonl", [row(n) for n in range(20)])
    write(ws.inbox / "b" / "test.jsonl", [row(5), row(6), row(50)])
    assert balanced(ws.ingest())
    expected = {("b", "held_out")}
    assert {stored(ws)[f"question {n}"] for n in (5, 6, 50)} == expected
    # Later, a stored training row moves to the held-out side, and a held-out row never to the training side.
    training = next(q for q, (_, side) in stored(ws).items() if side == "train")
    found = ws.ingest([row(6)], task="a", held_out=[row(int(training.split()[1])), row(51)])
    assert (found.rows, found.accepted, found.duplicates, found.held_out) == (3, 2, 1, 2)
    assert balanced(found)
    assert stored(ws)[training] == ("a", "held_out")
    assert {stored(ws)[f"question {n}"] for n in (5, 6, 50)} == expected


def test_a_held_out_row_that_was_learned_is_refused(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([row(n) for n in range(4)], task="a")
    learn(ws)
    found = ws.ingest([], task="a", held_out=[row(1), row(9)])
    assert (found.accepted, found.quarantined, found.reasons) == (1, 1, {"held-out-was-trained": 1})
    [bad] = ws.catalog.quarantined()
    assert "a version has already learned it" in bad["reason"]
    assert stored(ws)["question 1"] == ("a", "train")
    assert stored(ws)["question 9"] == ("a", "held_out")
    # A row that a version which does not serve has learned may come back, so it counts as learned.
    ws2 = workspace("held", val_size=0.0)
    ws2.ingest([row(n) for n in range(4)], task="a")
    ws2.update(max_steps=1, promote=False)
    assert registry.current(ws2) is None
    assert ws2.ingest([], task="a", held_out=[row(1)]).reasons == {"held-out-was-trained": 1}


def test_users_own_held_out_rows_turn_the_split_off(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.5)
    found = ws.ingest([row(n) for n in range(10)], task="a", held_out=[row(99)])
    assert (found.accepted, found.held_out) == (11, 1)
    assert ws.ingest([row(n) for n in range(10, 20)], task="a").held_out == 0
    assert ws.ingest([row(n) for n in range(20, 30)], task="b").held_out == 5


@pytest.mark.parametrize("failing", ["known", "add", "refuse", "remember_file"])
def test_a_failure_leaves_nothing(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    ws = workspace()
    write(ws.inbox / "a" / "rows.jsonl", [*(row(n) for n in range(6)), {"text": ""}])
    write(ws.inbox / "b" / "rows.jsonl", [row(n) for n in range(6, 12)])
    calls: list[Any] = []
    whole = getattr(Writer, failing)

    def fail_the_second_time(writer: Writer, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return whole(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, failing, fail_the_second_time)
        with pytest.raises(RuntimeError, match="power cut"):
            ws.ingest()
    assert ws.catalog.counts() == {"train": 0, "held_out": 0, "quarantined": 0}
    found = ws.ingest()
    assert (found.accepted, found.quarantined) == (12, 1)


def test_rows_longer_than_the_cutoff(workspace: MakeWorkspace) -> None:
    ws = workspace(cutoff_len=60)
    rows: Rows = [row(1), {"text": "x" * 100, "label": "yes"}]
    found = ws.ingest(rows, task="a")
    assert (found.accepted, found.quarantined, found.reasons) == (1, 1, {"too-long": 1})
    [bad] = ws.catalog.quarantined()
    # user and assistant turns: 2 start marks, 2 end marks, "user\n", "assistant\n", 2 line breaks, the texts.
    assert f"{100 + 3 + 4 + 5 + 10 + 2} tokens are more than cutoff_len=60" in bad["reason"]


def test_what_is_no_row_is_refused(workspace: MakeWorkspace) -> None:
    ws = workspace()
    odd: list[Any] = [row(1), "text", None, 3, ["a"], {"text": "\ud800", "label": "lone \udfff"}, {1: 2}]
    found = ws.ingest(odd, task="a")
    assert balanced(found)
    assert (found.rows, found.accepted) == (7, 1)


def test_wrong_calls_store_nothing(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace()
    with pytest.raises(UsageError, match="need task="):
        ws.ingest([row(1)])
    with pytest.raises(UsageError, match="does not exist"):
        ws.ingest([write(tmp_path / "a.jsonl", [row(1)]), tmp_path / "missing.jsonl"], task="a")
    write(ws.inbox / "lost.jsonl", [row(1)])
    with pytest.raises(UsageError, match="inbox/<task>/"):
        ws.ingest()
    (ws.root / "treering.yaml").write_text("lora_rank: many\n")
    with pytest.raises(ConfigError, match="lora_rank"):
        ws.ingest([row(1)], task="a")
    assert not any(ws.catalog.counts().values())


@pytest.mark.parametrize(
    ("path", "task", "side"),
    [
        ("pens/rows.jsonl", "pens", "train"),
        ("pens/more/rows.jsonl", "pens", "train"),
        ("pens/test.jsonl", "pens", "held_out"),
        ("pens/dev-1.jsonl", "pens", "held_out"),
    ],
)
def test_tasks_and_sides_come_from_the_names(workspace: MakeWorkspace, path: str, task: str, side: str) -> None:
    ws = workspace(val_size=0.0)
    write(ws.inbox / path, [row(1)])
    ws.ingest()
    assert stored(ws) == {"question 1": (task, side)}


@pytest.mark.parametrize(
    ("path", "named", "task"),
    [
        ("data/pens.jsonl", "data/pens.jsonl", "pens"),
        ("data/train.jsonl", "data/train.jsonl", "data"),
        ("pens/a.jsonl", "pens", "pens"),
        ("all/pens/a.jsonl", "all", "pens"),
    ],
)
def test_tasks_of_files_named_on_the_command_line(
    workspace: MakeWorkspace, tmp_path: Path, path: str, named: str, task: str
) -> None:
    ws = workspace()
    write(tmp_path / path, [row(1)])
    assert ws.ingest(tmp_path / named).tasks == {task: 1}
    assert ws.ingest(tmp_path / named, task="other").duplicates == 1


def test_a_default_system_turn(workspace: MakeWorkspace) -> None:
    ws = workspace(default_system="Be brief.", val_size=0.0)
    ws.ingest([row(1)], task="a")
    write(ws.inbox / "a" / "rows.jsonl", [row(2)])
    ws.ingest()
    [ids] = ws.catalog.waiting(()).values()
    assert [found.messages[0].content for found in ws.catalog.examples(ids).values()] == ["Be brief."] * 2


def test_a_lost_catalog_row_is_named(workspace: MakeWorkspace) -> None:
    with pytest.raises(TreeringError, match=r"lacks 1 row\(s\) .* first nothing"):
        workspace().catalog.examples(["nothing"])


@given(st.integers(0, 40), st.floats(0, 0.9), st.randoms())
def test_the_split_depends_on_the_rows_alone(count: int, share: float, rng: random.Random) -> None:
    ids = [f"row {n}" for n in range(count)]
    chosen = choose_held_out(ids, share)
    shuffled = rng.sample(ids, len(ids))
    assert choose_held_out(shuffled, share) == chosen <= set(ids)
    assert abs(len(chosen) - share * count) <= 1
    assert (len(chosen) >= 1) == (share > 0 and (count >= 5 or round(share * count) > 0))


texts = st.text(alphabet=string.ascii_letters + " é🎉\n\x00?.", max_size=4)
batches = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.booleans(), st.lists(st.tuples(texts, texts), max_size=6)),
    max_size=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches)
def test_whatever_comes_every_row_is_somewhere(
    workspace: MakeWorkspace, tmp_path_factory: pytest.TempPathFactory, batches: list[Any]
) -> None:
    ws = workspace(tmp_path_factory.mktemp("ws").name)
    accepted = 0
    for task, held_out, pairs in batches:
        rows = [{"text": question, "label": answer} for question, answer in pairs]
        found = ws.ingest([] if held_out else rows, task=task, held_out=rows if held_out else [])
        assert balanced(found)
        assert found.rows == len(rows)
        accepted += found.accepted
        train = {id for ids in ws.catalog.waiting(()).values() for id in ids}
        kept = {id for ids in ws.catalog.held_out().values() for id in ids}
        assert not train & kept
        assert sum(ws.catalog.counts()[side] for side in ("train", "held_out")) <= accepted


def test_small_ingests_hold_out_their_share_in_time(workspace: MakeWorkspace) -> None:
    ws = workspace()
    for start in range(0, 20, 4):
        ws.ingest(toy_rows("pens", 20)[start : start + 4], task="pens")
    assert len(ws.catalog.held_out()["pens"]) == 2


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a#b", "a:b?mode=memory"])
def test_the_catalog_lies_in_the_workspace_whatever_its_name(workspace: MakeWorkspace, name: str) -> None:
    ws = workspace(name)
    ws.ingest(toy_rows("pens", 4), task="pens")
    assert (ws.root / "treering.db").exists()
    assert {path.name for path in ws.root.parent.iterdir() if "treering" in path.name} == set()


def test_a_busy_catalog_says_so(workspace: MakeWorkspace) -> None:
    ws = workspace()
    other = Workspace(ws.root)
    with ws.catalog.writing(), other.catalog.engine.connect() as db:
        db.exec_driver_sql("PRAGMA busy_timeout = 10")
        db.close()
        with pytest.raises(LockError, match="another process is ingesting"), other.catalog.writing():
            pass


def test_only_some_files_of_the_inbox(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    first = write(ws.inbox / "a" / "one.jsonl", [row(0)])
    write(ws.inbox / "a" / "two.jsonl", [row(1)])
    assert ingest(ws, only={first}).tasks == {"a": 1}
    assert ingest(ws, only={first}).rows == 0
    assert ingest(ws).tasks == {"a": 1}


def test_rows_that_are_set_aside_are_neither_trained_nor_judged_by_until_they_are_taken_back(
    workspace: MakeWorkspace, tmp_path: Path
) -> None:
    ws = workspace()
    path = write(ws.inbox / "a" / "rows.jsonl", [*(row(n) for n in range(20)), {"text": ""}])
    judge = write(tmp_path / "judge.jsonl", [row(n) for n in range(100, 105)])
    ws.ingest()
    ws.ingest([], task="a", held_out=judge)
    before = stored(ws)
    ids = [id for ids in ws.catalog.waiting(()).values() for id in ids]
    held = [id for ids in ws.catalog.held_out().values() for id in ids]
    with ws.catalog.writing() as writer:
        assert writer.set_aside([*ids, *held], "bad labels") == 20
        assert writer.set_aside([*ids, *held], "again") == 0
        assert writer.sizes("a") == (5, 5)
    assert ws.catalog.waiting(()) == {}
    assert len(ws.catalog.held_out()["a"]) == 5  # The user's own stay.
    assert ws.catalog.counts() == {"train": 0, "held_out": 5, "quarantined": 21}
    assert len(ws.catalog.examples(ids)) == 18  # A version that learned them still finds them.

    write(path, [row(n) for n in range(22)])
    found = ws.ingest()
    assert (found.accepted, found.duplicates) == (2, 20) and balanced(found)
    assert ws.catalog.counts() == {"train": 2, "held_out": 5, "quarantined": 20}
    found = ws.ingest(path, task="a")
    assert (found.accepted, found.duplicates, found.held_out) == (20, 2, 2) and balanced(found)
    assert {question: stored(ws)[question] for question in before} == before
    assert ws.catalog.quarantined() == []


def test_where_rows_came_from(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    path = write(ws.inbox / "a" / "rows.jsonl", [row(n) for n in range(600)])
    ws.ingest()
    ws.ingest([row(1000)], task="b")
    ids = [id for ids in ws.catalog.waiting(()).values() for id in ids]
    origins = ws.catalog.origins(ids[::-1])
    assert list(origins) == ids
    assert [origin.file for origin in origins.values()] == [str(path)] * 600 + ["<python>"]
    assert {task: len(ids) for task, ids in ws.catalog.waiting((), str(path)).items()} == {"a": 600}


def test_a_file_whose_name_is_not_utf8_is_refused(workspace: MakeWorkspace) -> None:
    ws = workspace()
    write(ws.inbox / "pens" / "a.jsonl", toy_rows("pens", 10))
    (ws.inbox / "pens" / "a.jsonl").rename(os.fsdecode(os.fsencode(ws.inbox) + b"/pens/caf\xe9.jsonl"))
    found = ws.ingest()
    assert (found.accepted, found.quarantined, found.reasons) == (0, 1, {"file-name": 1})
    assert found.refused[0]["file"] == str(ws.inbox / "pens" / "caf\\udce9.jsonl")
    assert (ws.ingest().rows, overview.status(ws)["inbox"]) == (0, [])
