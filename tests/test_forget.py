"""Rows that are deleted on request are nowhere any more, never come in again, and can be taught around."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from treering import Workspace, files, registry
from treering.cli import run
from treering.data import export as exports
from treering.data import quarantine
from treering.data.example import Example
from treering.data.export import export
from treering.data.tombstones import FILE, KEY, Tombstones
from treering.data.where import Condition
from treering.errors import TreeringError, UsageError
from treering.forget import find, untaught
from treering.memory import Memory
from treering.results import RESULTS, read_results
from treering.router import ANYTHING, OWN, Router
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]

SECRET = "xyzzy"


def secret(task: str = "pens") -> dict[str, str]:
    """A row that nobody else says anything like."""
    return {"text": f"{SECRET} lives at the end of the road 4711", "label": f"{task} a"}


def id_of(row: dict[str, str]) -> str:
    turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
    return Example.of(turns).id


def traces(ws: Workspace, *words: str) -> list[str]:
    """Files of the workspace, but for the user's own, that have one of the words."""
    found = []
    for path in ws.root.rglob("*"):
        if path.is_file() and ws.inbox not in path.parents:
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content = json.dumps([result.id for result in read_results(path)]).encode()
            found += [str(path) for word in words if word.encode() in content]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """v1 has learned ten rows, v2 ten more and the secret one, v3 ten of another task; all is remembered."""
    settings: dict[str, Any] = {"model_name_or_path": str(model_folder), "bf16": False}
    ws = Workspace.create(
        tmp_path_factory.mktemp("forget") / "ws", **settings, memory={"size": 100}, gate={"floor": 1.0}
    )
    for task, rows in (("cups", toy_rows("cups", 10)), ("pens", [*toy_rows("pens", 10), secret()])):
        ws.ingest(rows, task=task)
        ws.update()
    ws.ingest(toy_rows("hats", 10), task="hats")
    ws.update()
    ws.catalog.flush()
    ws.catalog.engine.dispose()
    return ws.root


@pytest.fixture
def ws(whole: Path, tmp_path: Path) -> Workspace:
    """A copy of `whole`, to be changed."""
    return Workspace(shutil.copytree(whole, tmp_path / "copy", symlinks=True))


def held_out_row(ws: Workspace, task: str) -> str:
    return ws.catalog.held_out()[task][0]


def test_a_deleted_row_is_nowhere(ws: Workspace) -> None:
    gone = id_of(secret())
    judged = held_out_row(ws, "pens")
    assert gone in Memory.load(registry.get(ws, "v3").folder).rows
    weights = {v.name: (v.folder / "adapter_model.safetensors").read_bytes() for v in registry.versions(ws)}
    rows = {v.name: len(v.rows) for v in registry.versions(ws)}
    done = ws.forget([gone, judged])
    assert (done.rows, done.versions, done.current, done.damaged) == (2, ["v2", "v3"], True, [])
    assert traces(ws, gone, judged, SECRET) == []
    assert all(not version.problems() for version in registry.versions(ws))
    assert {v.name: (v.folder / "adapter_model.safetensors").read_bytes() for v in registry.versions(ws)} == weights
    assert {v.name: len(v.rows) for v in registry.versions(ws)} == {**rows, "v2": rows["v2"] - 1}
    v2 = registry.get(ws, "v2")
    stones = Tombstones(ws.root)
    assert v2.deleted_rows == {stones.of(gone)}
    [redaction] = v2.manifest["redactions"]
    assert redaction["held_out"] == [stones.of(judged)]
    assert v2.manifest["memory"] == Memory.load(v2.folder).by_task()


def test_it_does_not_come_in_again_nor_does_what_says_the_same(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    again = {**secret(), "text": secret()["text"].upper()}
    ws.ingest([secret(), again, *toy_rows("pens", 4)], task="pens")
    ws.forget(where=f"text~{SECRET}")
    found = ws.ingest([secret(), again, *toy_rows("pens", 4)], task="pens")
    assert (found.rows, found.accepted, found.duplicates, found.reasons) == (6, 0, 4, {"deleted": 2})
    assert traces(ws, SECRET, SECRET.upper()) == []
    with pytest.raises(UsageError, match="nothing of it is kept"):
        quarantine.release(ws, [quarantine.listed(ws, rule="deleted")[0]["number"]])
    ws.catalog.engine.dispose()
    for name in ("treering.db", "treering.db-wal", "treering.db-shm"):
        (ws.root / name).unlink(missing_ok=True)
    assert Workspace(ws.root).ingest([secret()], task="pens").reasons == {"deleted": 1}  # The catalog was lost.


def test_rows_in_quarantine_are_deleted_too(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    file = ws.inbox / "pens" / "rows.jsonl"
    file.parent.mkdir()
    lines = [
        {"question": f"where is {SECRET}?", "answer": "thither"},
        {"question": f"where is {SECRET}?", "answer": "here"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + f"no JSON, {SECRET}\n")
    assert ws.ingest().reasons == {"contradiction": 2, "bad-json": 1}
    found = find(ws, where=["answer=thither"])
    assert (found.stored, found.refused, found.alike) == (0, 1, 0)
    ws.forget(where="answer=thither")
    assert len(quarantine.listed(ws)) == 2
    assert traces(ws, "thither") == []
    ws.forget(where=[f"text~{SECRET}", "task=pens"])
    assert quarantine.listed(ws) == []
    assert traces(ws, SECRET) == []


def test_no_reason_quotes_a_row_that_is_gone(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    folder = ws.inbox / "pens"
    folder.mkdir()

    def write(name: str, answer: str, question: str = "who is the boss") -> None:
        (folder / name).write_text(json.dumps({"question": question, "answer": answer}))

    write("one.jsonl", f"{SECRET}, line 9, is it")
    write("two.jsonl", "somebody else")
    assert ws.ingest().reasons == {"contradiction": 2}
    write("one.jsonl", "yes it is", "something else entirely")  # Its row has left quarantine before it is deleted.
    ws.ingest()
    assert SECRET not in json.dumps(quarantine.listed(ws))
    write("three.jsonl", f"{SECRET}, line 9, is it")
    write("four.jsonl", "yet another")
    ws.ingest()
    ws.forget(where=f"text~{SECRET}")
    assert len(quarantine.listed(ws)) == 2
    assert traces(ws, SECRET) == []


def test_a_row_that_was_set_aside_leaves_both_places(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    with ws.catalog.writing() as writer:
        writer.set_aside([id_of(secret())], "held")
    assert ws.forget([id_of(secret())]).rows == 1
    assert quarantine.listed(ws) == []
    assert traces(ws, SECRET) == []


def test_exports_are_written_anew_unless_they_were_changed(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    files = {"a.json": "alpaca", "s.jsonl": "sharegpt", "o.parquet": "parquet", "changed.json": "openai"}
    for name, format in files.items():
        export(ws, tmp_path / name, format)
    with (tmp_path / "changed.json").open("ab") as changed:
        changed.write(b"\n")
    (tmp_path / "gone.json").write_text("")
    done = ws.forget([id_of(secret())])
    assert sorted(done.exports) == sorted(str(tmp_path / name) for name in files if name != "changed.json")
    assert list(done.kept_exports) == [str(tmp_path / "changed.json")]
    for name in ("a.json", "s.jsonl", "o.parquet"):
        assert SECRET.encode() not in (tmp_path / name).read_bytes()
        other = Workspace.create(tmp_path / f"ws-{name}")
        assert other.ingest(tmp_path / name, task="pens").accepted == 4
    assert ws.forget([ws.catalog.waiting(())["pens"][0]]).kept_exports.keys() == done.kept_exports.keys()


def test_rebuilding_goes_back_to_what_had_not_learned_it(ws: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["forget", "--where", f"text~{SECRET}", "--yes", "--rebuild", "--json", "-w", str(ws.root)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["found"], found["versions"]) == (1, ["v2", "v3"])
    assert (found["rebuilt"]["from"], found["rebuilt"]["status"], found["rebuilt"]["version"]) == (
        "v1",
        "promoted",
        "v4",
    )
    v4 = registry.get(ws)
    assert (v4.name, v4.parent, registry.unlearned(ws, v4)) == ("v4", "v1", False)
    assert sorted(task for task in v4.manifest["rows"]) == ["hats", "pens"]
    assert run(["forget", "--rebuild", "-w", str(ws.root)]) == 0
    assert "there is nothing to rebuild" in capsys.readouterr().out
    assert untaught(ws) == v4
    with pytest.raises(UsageError, match="v3 has learned rows that were deleted on request"):
        ws.promote("v3")
    assert ws.promote("v3", force=True).name == "v3"


def test_rebuilding_from_the_base_model(workspace: MakeWorkspace) -> None:
    ws = workspace(gate={"floor": 1.0})
    ws.ingest([secret(), *toy_rows("pens", 10)], task="pens")
    ws.update()
    ws.forget([id_of(secret())])
    assert untaught(ws) is None
    assert run(["forget", "--rebuild", "-w", str(ws.root)]) == 0
    assert (registry.get(ws).name, registry.get(ws).parent) == ("v2", None)


def test_nothing_is_deleted_unasked(ws: Workspace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    here = ["-w", str(ws.root)]
    before = ws.catalog.counts()
    ids = tmp_path / "ids"
    ids.write_text(f"{id_of(secret())}\n")
    assert run(["forget", "--ids", str(ids), "--dry-run", *here]) == 0
    assert "1 stored row and 0 in quarantine are meant" in capsys.readouterr().out
    assert run(["forget", "--ids", str(ids), *here]) == 3
    assert "--yes" in capsys.readouterr().err
    assert run(["forget", *here]) == 3
    assert "--ids FILE, --where CONDITION" in capsys.readouterr().err
    ids.write_text("0123456789abcdef0123456789abcdef")
    assert run(["forget", "--ids", str(ids), "--yes", *here]) == 3
    assert "no row has the id '0123456789abcdef0123456789abcdef'" in capsys.readouterr().err
    assert run(["forget", "--ids", str(tmp_path / "none"), *here]) == 3
    assert ws.catalog.counts() == before
    assert not (ws.root / FILE).exists()


def test_a_version_that_was_changed_is_not_sealed_anew(ws: Workspace) -> None:
    v2 = registry.get(ws, "v2")
    (v2.folder / "log.jsonl").write_text("changed")
    done = ws.forget([id_of(secret())])
    assert [text.partition(":")[0] for text in done.damaged] == ["v2"]
    assert v2.problems() == ["v2: log.jsonl was changed since the version was made"]


def test_the_key_of_the_tombstones_is_wanted(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret()], task="pens")
    ws.forget([id_of(secret())])
    assert (ws.root / KEY).stat().st_mode & 0o077 == 0
    kept = (ws.root / KEY).read_text()
    for broken in ("00" * 32, "no hex"):
        (ws.root / KEY).write_text(broken)
        with pytest.raises(TreeringError, match=r"\.deleted\.key.*restore both"):
            ws.ingest([secret()], task="pens")
    (ws.root / KEY).write_text(kept)
    assert ws.ingest([secret()], task="pens").reasons == {"deleted": 1}


def test_the_index_of_near_duplicates_lets_go(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    before = sum(path.stat().st_size for path in (ws.root / "near").rglob("sketches.npy"))
    ws.forget([id_of(secret())])
    after = sum(path.stat().st_size for path in (ws.root / "near").rglob("sketches.npy"))
    assert after < before
    near = {**secret(), "text": secret()["text"] + " there"}
    assert ws.ingest([near], task="pens").accepted == 1  # Nothing is left that it could be near to.
    assert ws.ingest([{**near, "text": near["text"] + " again"}], task="pens").near == 1


def turns(*said: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def test_a_label_that_no_row_has_any_more_is_nowhere(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0, memory={"size": 2}, gate={"floor": 1.0, "margin": 1.0})
    label = f"{SECRET} Main Street"
    held_out = [{"text": f"a question {at}", "label": "pens a"} for at in range(3)]
    gone = [{"text": f"where does number {at} live?", "label": label} for at in (1, 2, 3)]
    ws.ingest([*gone, *toy_rows("pens", 10)], task="pens", held_out=held_out)
    ws.update()
    ws.ingest(toy_rows("cups", 10), task="cups")
    ws.update()
    versions = [registry.get(ws, name) for name in ("v1", "v2")]
    before = [Router.load(version.folder) for version in versions]
    assert all(f"pens\n{label.lower()}" in router.expert for router in before)
    ws.forget([id_of(gone[0])])
    assert [Router.load(version.folder).expert for version in versions] == [router.expert for router in before]
    ws.forget(where=f"answer={label}")
    assert traces(ws, SECRET) == []
    for version, was in zip(map(registry.get, (ws, ws), ("v1", "v2")), before, strict=True):
        router = Router.load(version.folder)
        assert version.problems() == [] and SECRET not in json.dumps(Memory.load(version.folder).seen)
        assert list(router.expert) == [name for name in was.expert if SECRET not in name]
        assert {*router.answers, ANYTHING} == router.expert.keys()
        for at, name in enumerate(router.expert):
            assert torch.equal(router.sums[at], was.sums[list(was.expert).index(name)])
        assert torch.linalg.eigvalsh(router.products)[0] > -1e-6
        router.expert = {name: name for name in router.expert}  # Each mean is nearest to itself.
        assert router.nearest(router.sums / router.counts[:, None])[0] == list(router.expert)
    ws.ingest(toy_rows("hats", 10), task="hats")
    ws.update()
    assert traces(ws, SECRET) == []


def test_somebody_answers_where_all_that_was_learned_is_gone(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0, gate={"floor": 1.0, "margin": 1.0})
    ws.ingest(toy_rows("pens", 6), task="pens", held_out=[{"text": "a question", "label": "pens a"}])
    ws.update()
    ws.forget(where="task=pens")
    v1 = registry.get(ws, "v1")
    router = Router.load(v1.folder)
    assert (list(router.expert), router.answers, v1.problems()) == ([ANYTHING, "\n"], {}, [])
    assert router.route(router.sums / router.counts[:, None]) == [None, OWN]
    assert traces(ws, "pens a") == []


def test_what_a_conversation_asks_on_the_way_is_forgotten_too(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    asked = [("user", f"who is {SECRET}?"), ("assistant", "a word"), ("user", "and then?"), ("assistant", "nothing")]
    ws.ingest([turns(*asked), *toy_rows("pens", 4)], task="pens")
    ws.forget(where=f"text~{SECRET}")
    with sqlite3.connect(ws.root / "treering.db") as db:
        assert db.execute("SELECT count(*) FROM within").fetchone() == (0,)
    db.close()
    assert ws.ingest([], task="pens", held_out=[turns(*asked[:2])]).withdrawn == 0


CALLING: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "is it warm there?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": SECRET}}}
            ],
        },
        {"role": "tool", "content": "21", "name": "weather", "tool_call_id": "c1"},
        {"role": "assistant", "content": "21 degrees"},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
}


def test_an_export_that_cannot_say_all_of_a_row_is_cleaned_too(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([CALLING, secret()], task="tools")
    for format, name in (
        ("sharegpt", "s.json"),
        ("sharegpt", "s.jsonl"),
        ("openai", "o.json"),
        ("parquet", "o.parquet"),
    ):
        export(ws, tmp_path / name, format)
    shutil.copy(tmp_path / "s.json", tmp_path / "copy.json")
    done = ws.forget(where=f"text~{SECRET}")
    assert (done.rows, len(done.exports), done.kept_exports) == (2, 4, {})
    assert json.loads((tmp_path / "s.json").read_text()) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_file() and SECRET.encode() in path.read_bytes()] == [
        "copy.json"
    ]
    assert ws.ingest(tmp_path / "copy.json", task="tools").reasons == {"deleted": 2}


@pytest.mark.parametrize(
    "again",
    [
        turns(("user", "Where does Jane  Doe live?"), ("assistant", "In Main Street 5.")),
        turns(("user", "where does jane doe live"), ("assistant", "in main street 5")),
        turns(("system", "Be brief."), ("user", "Where does Jane Doe live?"), ("assistant", "In Main Street 5.")),
        {"question": "Where does Jane Doe live", "answer": "In Main Street 5!"},
    ],
)
def test_a_row_is_known_by_what_it_says(workspace: MakeWorkspace, again: dict[str, Any]) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([turns(("user", "Where does Jane Doe live?"), ("assistant", "In Main Street 5."))], task="t")
    ws.forget(where="text~jane")
    found = ws.ingest([again, {"question": "Where does Jane Doe live?", "answer": "in Main Street 6"}], task="t")
    assert (found.reasons, found.accepted) == ({"deleted": 1}, 1)


def test_what_says_the_same_goes_too_and_is_told(workspace: MakeWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    ws = workspace(val_size=0.0)
    one, two = (turns(("system", who), ("user", "who?"), ("assistant", SECRET)) for who in ("a pirate", "a butler"))
    ws.ingest([one, two, *toy_rows("pens", 2)], task="t")
    here = ["forget", "--where", "text~pirate", "-w", str(ws.root)]
    assert run([*here, "--dry-run"]) == 0
    assert "2 stored rows and 0 in quarantine are meant\n  1 of them for saying the same" in capsys.readouterr().out
    assert run([*here, "--yes"]) == 0
    assert capsys.readouterr().out.startswith("2 rows deleted, not to come in again\n")
    assert traces(ws, SECRET, "butler") == []


def test_what_is_no_row_does_not_come_in_again_either(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    (ws.inbox / "t").mkdir()
    file = ws.inbox / "t" / "rows.jsonl"
    lines = [f"no JSON, {SECRET}", json.dumps({"question": f"{SECRET}?", "answer": ""}), f"no JSON, {SECRET * 1000}"]
    file.write_text("\n".join([*lines, "nor this", ""]))
    assert ws.ingest().quarantined == 4
    done = ws.forget(where=f"text~{SECRET}")
    assert (done.rows, done.unknown) == (3, 0)
    assert ws.ingest(file).reasons == {"deleted": 3, "bad-json": 1}
    assert traces(ws, SECRET) == []


SPELLINGS = {
    "decomposed": "Ju\u0308rgen Mu\u0308ller",
    "with a blank that does not break": "Jürgen\u00a0Müller",
    "with a narrow one": "Jürgen\u202fMüller",
    "over two lines": "Jürgen\r\n  Müller",
    "in capitals": "JÜRGEN MÜLLER",
    "in full width": "\uff2aürgen \uff2düller",
    "with a soft hyphen": "Jürgen Mül\u00adler",
    "escaped, as a tool says it": json.dumps({"name": "Jürgen Müller"}),
}


@pytest.mark.parametrize("name", SPELLINGS.values(), ids=SPELLINGS)
def test_a_name_is_found_however_it_is_written(workspace: MakeWorkspace, name: str) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([{"text": f"where does {name} live?", "label": "b"}, *toy_rows("pens", 4)], task="pens")
    for asked in ("Jürgen Müller", "Ju\u0308rgen  mu\u0308ller", "jürgen\u00a0müller"):
        assert find(ws, where=[f"text~{asked}"]).stored == 1
    assert find(ws, where=["text~Jürgen Muller"]).rows == 0


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"question": "", "answer": "Jürgen Müller"}),
        json.dumps({"question": "", "answer": "Jürgen\nMüller"}),
        json.dumps({"question": "", "answer": json.dumps(["Jürgen Müller"])}),
        json.dumps({"question": "is it Jürgen Müller?", "answer": "yes"})[:-1],
        "{'question': 'J\\xfcrgen M\\xfcller', ",
    ],
    ids=["refused", "over two lines", "JSON in JSON", "cut off", "of Python"],
)
def test_a_name_is_found_in_what_is_no_row(workspace: MakeWorkspace, tmp_path: Path, line: str) -> None:
    ws = workspace(val_size=0.0)
    file = tmp_path / "rows.jsonl"
    assert "ü" not in line
    file.write_text(line + "\n")
    assert ws.ingest(file, task="t").quarantined == 1
    assert ws.forget(where="text~Jürgen Müller").rows == 1
    assert ws.ingest(file, task="t").reasons == {"deleted": 1}


def test_what_is_no_row_is_known_without_its_escapes(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0)
    file = tmp_path / "rows.jsonl"
    broken = json.dumps({"question": "is it Jürgen Müller?"})[:-1]
    file.write_text(broken + "\n")
    ws.ingest(file, task="t")
    ws.forget(where="text~Müller")
    file.write_text(broken.replace("\\u00fc", "ü") + "\n")
    assert ws.ingest(file, task="t").reasons == {"deleted": 1}


def test_what_has_no_text_is_deleted_and_may_come_again(
    workspace: MakeWorkspace, capsys: pytest.CaptureFixture[str]
) -> None:
    ws = workspace(val_size=0.0)
    for task in ("t", "other"):
        (ws.inbox / task).mkdir()
        (ws.inbox / task / "rows.jsonl").write_text("")
    assert ws.ingest().reasons == {"empty-file": 2}
    assert run(["forget", "--where", "task=t", "--yes", "-w", str(ws.root)]) == 0
    assert "1 row deleted, not to come in again\n  but for 1 of which quarantine had no text" in capsys.readouterr().out
    assert [entry["task"] for entry in quarantine.listed(ws)] == ["other"]
    assert ws.ingest(ws.inbox / "t").reasons == {"empty-file": 1}


class PowerCut(BaseException):
    """Nothing comes behind it."""


def test_what_is_no_row_goes_when_a_deletion_that_was_cut_off_is_finished(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = workspace(val_size=0.0)
    file = ws.inbox / "t" / "rows.jsonl"
    file.parent.mkdir()
    file.write_text(f"no JSON, {SECRET}\n")
    (ws.inbox / "t" / "empty.jsonl").write_text("")
    ws.ingest([secret()], task="t")
    ws.ingest()

    def cut(_: Workspace) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr("treering.forget.clear", cut)
        with pytest.raises(PowerCut):
            ws.forget(where="task=t")
    assert traces(ws, SECRET) != []
    ws = Workspace(ws.root)
    assert traces(ws, SECRET) == []
    assert quarantine.listed(ws) == []
    assert not (ws.root / ".deleting").exists()


READER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN")
db.execute("SELECT count(*) FROM rows").fetchone()
print("reads", flush=True)
sys.stdin.read()
"""


@contextmanager
def somebody_reads(ws: Workspace) -> Iterator[None]:
    """A transaction of another process that sees the catalog as it is now."""
    command = [sys.executable, "-c", READER, str(ws.root / "treering.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "reads\n"
        yield
        process.communicate()


@pytest.mark.parametrize("flushed", [False, True])
def test_who_reads_the_catalog_keeps_a_deletion_from_its_end(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flushed: bool
) -> None:
    """Whether the texts are in its pages or in its log: what is on disk is said to be there."""
    monkeypatch.setattr("treering.forget.PATIENCE", 0.2)
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    assert not flushed or ws.catalog.flush()
    command = ["-w", str(ws.root)]
    with somebody_reads(ws):
        assert run(["forget", "--where", f"text~{SECRET}", "--yes", *command]) == 1
        assert "1 row deleted, not to come in again\n  NOT FINISHED: somebody still reads" in capsys.readouterr().out
        assert traces(ws, SECRET) != []
        assert find(ws, where=[f"text~{SECRET}"]).rows == 0
        assert run(["status", *command]) == 0
        assert "rows were deleted, but somebody still reads treering.db" in capsys.readouterr().err
        assert (ws.root / ".deleting").exists()
    assert run(["status", *command]) == 0
    assert capsys.readouterr().err == ""
    assert traces(ws, SECRET) == []
    assert not (ws.root / ".deleting").exists()


def test_a_deletion_waits_for_who_reads_the_catalog(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    with ThreadPoolExecutor(1) as pool, somebody_reads(ws):
        done = pool.submit(ws.forget, where=f"text~{SECRET}")
        time.sleep(0.5)
        assert not done.done()
    assert not done.result().unfinished
    assert traces(ws, SECRET) == []


def test_what_comes_in_while_a_deletion_begins_is_known_too(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    near = {**secret(), "text": secret()["text"] + " or beyond"}

    def meanwhile(_: Workspace) -> None:
        assert ws.ingest([near], task="pens").near == 1

    with monkeypatch.context() as patch:
        patch.setattr("treering.forget.clear", meanwhile)
        ws.forget([id_of(secret())])
    assert ws.ingest([near], task="pens").reasons == {"deleted": 1}


@pytest.mark.parametrize("where", ["before it has its name", "once it has"])
def test_an_export_that_was_cut_off_is_found(
    workspace: MakeWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    out = tmp_path / "out"
    out.mkdir()
    plain = files.fsync_folder

    def cut(path: Path, *_: Any) -> None:
        if out in (path, path.parent):
            raise PowerCut
        plain(path)

    with monkeypatch.context() as patch:
        if where == "once it has":
            patch.setattr(files, "fsync_folder", cut)
        else:
            patch.setattr(Path, "replace", cut)
        with pytest.raises(PowerCut):
            export(ws, out / "a.json", "openai")
    [left] = out.iterdir()
    assert SECRET in left.read_text()
    done = ws.forget([id_of(secret())])
    assert done.kept_exports == {}
    assert [path for path in out.iterdir() if SECRET in path.read_text()] == []
    assert done.exports == ([str(left)] if left.name == "a.json" else [])


def test_a_deletion_may_be_cut_off_anywhere(
    workspace: MakeWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its tombstones are set all is as it was; after that nothing of the rows is left, exports included."""
    ws = workspace(val_size=0.0)
    (tmp_path / "r.jsonl").write_text(f"no JSON, {SECRET}\n")
    ws.ingest([secret(), {**secret(), "text": secret()["text"] + " or so"}, *toy_rows("pens", 2)], task="pens")
    ws.ingest(tmp_path / "r.jsonl", task="pens")
    export(ws, ws.root / "rows.json", "openai")
    quarantine.export(ws, ws.root / "refused.jsonl")
    ws.catalog.flush()
    ws.catalog.engine.dispose()
    shutil.copytree(ws.root, tmp_path / "before")
    plain, fates = os.fsync, list[str]()
    for last in range(100):
        shutil.rmtree(ws.root)
        shutil.copytree(tmp_path / "before", ws.root)
        ws, left = Workspace(ws.root), iter(range(last))

        def cut(descriptor: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise PowerCut
            plain(descriptor)

        with monkeypatch.context() as patch, suppress(PowerCut):
            patch.setattr(os, "fsync", cut)
            ws.forget(where=f"text~{SECRET}")
            fates.append("done")
        ws.catalog.engine.dispose()
        ws = Workspace(ws.root)
        ws.catalog.flush()
        found = traces(ws, SECRET)
        if fates[-1:] == ["done"]:
            assert found == []
            break
        fates.append("kept" if found else "gone")
        assert len(found) in (0, 3), (last, found)
        assert not (ws.root / ".deleting").exists()
    assert fates == [*["kept"] * fates.count("kept"), *["gone"] * fates.count("gone"), "done"]
    assert fates.count("gone") > 5


@pytest.mark.parametrize("late", [False, True])
def test_an_export_that_a_deletion_meets_is_not_written(
    workspace: MakeWorkspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    plain = exports._stored if not late else Path.replace

    def meet(*arguments: Any) -> Any:
        monkeypatch.undo()
        ws.forget([id_of(secret())])
        return plain(*arguments)

    if late:
        monkeypatch.setattr(Path, "replace", meet)
    else:
        monkeypatch.setattr(exports, "_stored", meet)
    with pytest.raises(TreeringError, match=r"a\.json was not written, for rows were deleted meanwhile"):
        export(ws, tmp_path / "a.json", "openai")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_exports_that_cannot_be_read_are_told(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([secret(), *toy_rows("pens", 4)], task="pens")
    for name in ("a.jsonl", "b.json"):
        export(ws, tmp_path / name, "openai")
    (tmp_path / "a.jsonl").write_text(f"no JSON, {SECRET}\n")
    (tmp_path / "b.json").write_text("[")
    done = ws.forget([id_of(secret())])
    assert done.exports == []
    assert sorted(done.kept_exports) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")]
    assert all("cannot be read" in why for why in done.kept_exports.values())


def test_files_of_quarantine_are_written_anew_too(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0)
    file = ws.inbox / "pens" / "rows.jsonl"
    file.parent.mkdir()
    lines = [{"question": "who is it?", "answer": answer} for answer in (SECRET, "nobody")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + f"no JSON, {SECRET}\nnor this\n")
    assert ws.ingest().reasons == {"contradiction": 2, "bad-json": 2}
    for name in ("all.txt", "changed.txt"):
        quarantine.export(ws, tmp_path / name)
    with (tmp_path / "changed.txt").open("a") as changed:
        changed.write("\n")
    done = ws.forget(where=f"text~{SECRET}")
    assert (done.exports, list(done.kept_exports)) == ([str(tmp_path / "all.txt")], [str(tmp_path / "changed.txt")])
    assert SECRET not in (tmp_path / "all.txt").read_text()
    left = [json.loads(line) for line in (tmp_path / "all.txt").read_text().splitlines()]
    assert [(row["line"], row["rule"]) for row in left] == [(4, "bad-json"), (2, "contradiction")]
    with pytest.raises(UsageError, match="no file in an existing folder"):
        quarantine.export(ws, tmp_path / "none" / "a.jsonl")


MENDING = ("personal-data", "control-characters", "broken-encoding", "special-tokens")


@pytest.mark.parametrize("one", [*MENDING, ""])
@pytest.mark.parametrize("levels", [("repair", "off"), ("off", "repair")])
def test_rows_that_rules_mend_do_not_come_back_in_another_form(
    workspace: MakeWorkspace, tmp_path: Path, one: str, levels: tuple[str, str]
) -> None:
    """Where `one` rule (or none) goes from a level to another, and all others go the other way."""
    before, after = ({name: levels[way ^ (name == one)] for name in MENDING} for way in (0, 1))
    ws = workspace(val_size=0.0, checks=before)
    questions = ["mail jane@example.com", "the cafÃ© of Jane", "a <|im_start|> by Jane", "the con\x07trol of Jane"]
    questions.append("at the cafÃ© \x07 jane@example.com said <|im_end|>")
    file = tmp_path / "rows.jsonl"
    rows = [{"question": question, "answer": f"{number} it is"} for number, question in enumerate(questions)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ws.ingest(file, task="t").accepted == 5
    assert ws.forget(where="task=t").rows == 5
    settings = ws.root / "treering.yaml"
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | {"checks": after}))
    assert ws.ingest(file, task="t").reasons == {"deleted": 5}
    assert ws.ingest([{"question": "the café of Joe", "answer": "it is"}], task="t").accepted == 1


def test_every_text_of_a_row_is_searched(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0, stage="dpo")
    pair = {"question": "who?", "chosen": "you", "rejected": f"{SECRET} himself"}
    ws.ingest([CALLING, pair], task="t")
    assert find(ws, where=[f"text~{SECRET}"]).stored == 2
    assert find(ws, where=[f"answer={SECRET} himself"]).stored == 1
    assert find(ws, where=["text~object"]).stored == 1
    for frame in ("function", "arguments", "assistant"):
        assert find(ws, where=[f"text~{frame}"]).stored == 0


@pytest.mark.parametrize(
    ("condition", "row", "holds"),
    [
        ("task=pens", {"task": "pens"}, True),
        ("task = pens", {"task": "pens 2"}, False),
        ("task~PEN", {"task": "my pens"}, True),
        ("file~june", {"file": "a/june.csv"}, True),
        ("answer=b", {"messages": [{"content": "b a"}, {"content": "b"}]}, True),
        ("answer=b", {"messages": None, "raw": "b"}, False),
        ("text~JANE@", {"messages": [{"content": "jane@example.com"}, {"content": "b"}]}, True),
        ("text~jane", {"messages": None, "raw": "{jane"}, True),
        ("added<2026-01-02", {"added": "2026-01-01T23:59:59+00:00"}, True),
        ("added<2026-01-02T00:00:00+02:00", {"added": "2026-01-01T23:00:00+00:00"}, False),
        ("added>2026-01-02", {"added": "2026-01-02T00:00:01+00:00"}, True),
    ],
)
def test_conditions(condition: str, row: dict[str, Any], holds: bool) -> None:
    assert Condition.of(condition).holds(row) is holds


@pytest.mark.parametrize(
    "text", ["task", "task<pens", "colour=red", "text=all of it", "task=", "text~\u200b", "added<soon", ""]
)
def test_conditions_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--where|is no time"):
        Condition.of(text)


def test_a_row_that_judged_taught_nothing(ws: Workspace) -> None:
    judged = held_out_row(ws, "cups")
    before = len(read_results(registry.get(ws, "v3").folder / RESULTS))
    done = ws.forget([judged])
    assert (done.versions, done.current) == ([], False)  # It judged, and taught nothing.
    assert len(read_results(registry.get(ws, "v3").folder / RESULTS)) == before - 1
    assert ws.update() is None
    ws.ingest(toy_rows("pads", 10), task="pads")
    made = ws.update()
    assert made is not None
    assert judged not in {result.id for result in read_results(made.folder / RESULTS)}
