"""Rows that are deleted on request are nowhere any more, never come in again, and can be taught around."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace, registry
from treering.cli import run
from treering.data import quarantine
from treering.data.example import Example
from treering.data.export import export
from treering.data.tombstones import FILE, KEY, Tombstones
from treering.data.where import Condition
from treering.errors import TreeringError, UsageError
from treering.forget import find, untaught
from treering.memory import Memory
from treering.results import RESULTS, read_results
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
    assert (len(found.ids), len(found.numbers)) == (1, 1)
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
    assert "1 stored rows and 0 in quarantine are meant" in capsys.readouterr().out
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


@pytest.mark.parametrize("text", ["task", "task<pens", "colour=red", "text=all of it", "task=", "added<soon", ""])
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
