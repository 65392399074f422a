"""What is told of rows: a task's figures, one row's story, what a version learned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from treering import Workspace, registry
from treering.cli import run
from treering.data import language
from treering.data.example import Example
from treering.data.stats import _characters, stats
from treering.data.story import story, trace
from treering.errors import UsageError
from treering.testing import toy_rows

LONG = "please tell me how I can send the lamp back that I bought from you"


def row(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"question": question, "answer": answer}


@pytest.fixture(scope="module")
def ws(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Workspace:
    """A version that learned twenty rows, then a near duplicate, a row that supersedes, one refused, new ones."""
    settings: dict[str, Any] = {"model_name_or_path": str(model_folder), "bf16": False, "val_size": 0.0}
    # What is held out is unlike what is learned here, and is to say that something was.
    settings |= {"memory": {"size": 100}, "recall": {"fallback": False}}
    ws = Workspace.create(tmp_path_factory.mktemp("stats") / "ws", **settings)
    ws.ingest(
        [*toy_rows("a", 19), row(LONG, "a a")], task="a", held_out=[row("one held", "a b"), row("two held", "a c")]
    )
    assert ws.update(max_steps=1, gate={"floor": 1.0, "margin": 1.0}) is not None
    ws.ingest([row(LONG.replace("please ", ""), "a a"), row("a item 0: sort a", "a z"), row("x", "x")], task="a")
    ws.ingest(
        [row("something quite different", "a b")] + [row(f"what is {n}", f"{n} it is") for n in range(9)], task="b"
    )
    ws.ingest([row("nothing is right here", "")], task="c")
    return ws


def test_figures_of_a_task(ws: Workspace) -> None:
    found = stats(ws)
    assert found.keys() == {"a", "b", "c"}
    a = found["a"]
    assert a["rows"] == {"train": 20, "held_out": 2, "superseded": 1, "left_out": 1, "quarantined": 1, "waiting": 1}
    assert a["label_count"] == 5 and sum(a["labels"].values()) == 20
    assert a["characters"]["most"] == len(LONG) + 3
    assert a["drift"]["words"] >= 0
    assert 0 < a["drift"]["lengths"] < 1  # The one new row is as long as some of the learned ones.
    assert a["drift"]["labels"] == pytest.approx(1.0)  # No learned row has the new row's label.
    assert found["b"]["labels"] == {} and found["b"]["drift"] is None  # Open answers; nothing of it was learned.
    assert stats(ws, "b").keys() == {"b"}
    assert found["c"]["rows"] == {"quarantined": 1, "waiting": 0} and found["c"]["labels"] == {}


@pytest.mark.parametrize(
    ("task", "said"),
    [("nope", "there is no task 'nope'; there are: a, b, c"), ("", "there is no task ''"), ("aa", "did you mean 'a'")],
)
def test_a_task_that_is_not_there(ws: Workspace, capsys: pytest.CaptureFixture[str], task: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        stats(ws, task)
    assert run(["data", "stats", "--task", task, "-w", str(ws.root)]) == 3
    assert said in capsys.readouterr().err


def test_a_task_out_of_balance(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([row(f"question {n}", "often" if n else "rarely") for n in range(20)], task="a")
    assert stats(ws)["a"]["imbalance"] == 19.0


@pytest.mark.parametrize(
    ("lengths", "said"), [([36, 40], (36, 40, 40)), ([9], (9, 9, 9)), (range(1, 101), (50, 95, 100)), ([], None)]
)
def test_lengths_are_in_order(lengths: Iterable[int], said: tuple[int, int, int] | None) -> None:
    found = _characters(Example.of([{"role": "text", "content": "x" * length}]) for length in lengths)
    assert found == ({} if said is None else dict(zip(("median", "p95", "most"), said, strict=True)))


TEXTS = {
    "de": "Wie kann ich die Lampe zurückschicken, die ich bei euch gekauft habe?",
    "en": "How can I send back the lamp that I bought from you last week?",
    "fr": "Comment puis-je renvoyer la lampe que j'ai achetée chez vous ?",
}


def test_languages_are_counted(workspace: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lingua", exc_type=ImportError)
    ws = workspace(val_size=0.0, dedup={"near": "keep"})
    many = {"de": 3, "en": 2, "fr": 1}
    rows = [row(f"{TEXTS[code]} ({n})", "ok") for code, count in many.items() for n in range(count)]
    ws.ingest([*rows, row("42 17 x", "ok")], task="a")
    assert stats(ws)["a"]["languages"] == {"de": 3, "en": 2, "fr": 1, "unclear": 1}
    assert run(["data", "stats", "-w", str(ws.root)]) == 0
    assert "  languages of 7 rows: de 3, en 2, fr 1, unclear 1\n" in capsys.readouterr().out


def test_languages_without_lingua(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lingua", None)
    language._detector.cache_clear()
    ws = workspace(val_size=0.0)
    for task in ("a", "b"):
        ws.ingest([row(f"how is {task}?")], task=task)
    assert [of["languages"] for of in stats(ws).values()] == [None, None]
    assert run(["data", "stats", "-w", str(ws.root)]) == 0
    assert capsys.readouterr().out.count("pip install 'treering[language]'") == 1


def test_a_rows_story(ws: Workspace) -> None:
    [version] = [version.name for version in registry.versions(ws)]
    ids = {e.prompt[-1].content: id for id, e in ws.catalog.examples(ws.catalog.train_ids("a")).items()}
    told = story(ws, ids[LONG][:10])
    assert (told["where"], told["task"], told["versions"], told["judged"]) == ("train", "a", [version], [])
    assert told["memory"] == [version]
    assert [(like["file"], like["line"]) for like in told["likes"]] == [("<python>", 1)]
    judged = story(ws, ws.catalog.held_out()["a"][0])
    assert (judged["where"], judged["versions"], judged["judged"]) == ("held_out", [], [version])
    for wrong in ("abc", "0" * 32, "zzzzzzzz"):
        with pytest.raises(UsageError, match="names no row"):
            story(ws, wrong)


def test_what_a_version_learned(ws: Workspace) -> None:
    [version] = registry.versions(ws)
    found = trace(ws, version)
    assert found["version"] == version.name and found["tasks"] == {"a": 20}
    assert found["files"] == {"<python>": 20} and len(found["rows"]) == 20
    superseded = [row for row in found["rows"] if story(ws, row["id"])["where"] == "superseded"]
    assert [row["line"] for row in superseded] == [1]
