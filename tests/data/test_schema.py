"""Catalogs that an older treering made, and what the tables promise."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from treering import Workspace
from treering.data import quarantine
from treering.data.schema import SCHEMA
from treering.errors import TreeringError

MakeWorkspace = Callable[..., Workspace]

_QUARANTINE_2 = """
CREATE TABLE quarantine (
    seq INTEGER NOT NULL PRIMARY KEY, task TEXT NOT NULL, file TEXT NOT NULL, line INTEGER NOT NULL, rule TEXT NOT NULL,
    reason TEXT NOT NULL, raw TEXT NOT NULL, added TEXT NOT NULL, split TEXT NOT NULL, messages TEXT
)
"""
"""As schema 2 had it."""

QUOTE = "b.jsonl, line 1, answers the same with 'xyzzy'; keep the one that is true, or set dedup.contradictions"


def row(question: str, answer: str = "yes") -> dict[str, str]:
    return {"question": question, "answer": answer}


def numbers(ws: Workspace) -> list[int]:
    return [entry["number"] for entry in quarantine.listed(ws)]


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    return workspace(val_size=0.0)


def made_by_schema_2(ws: Workspace) -> None:
    ws.catalog.engine.dispose()
    del ws.catalog
    with sqlite3.connect(ws.root / "treering.db") as db:
        db.execute("DROP INDEX ix_quarantine_file")
        db.execute("ALTER TABLE quarantine RENAME TO new")
        db.execute(_QUARANTINE_2)
        db.execute("INSERT INTO quarantine SELECT * FROM new")
        db.execute("DROP TABLE new")
        db.execute("CREATE INDEX ix_quarantine_file ON quarantine (file)")
        db.execute("UPDATE quarantine SET reason = ? WHERE rule = 'contradiction'", [QUOTE])
        db.execute("UPDATE words SET rows = 9, counts = ?", [json.dumps({"xyzzy": 3})])
        db.execute("ALTER TABLE meta DROP COLUMN root")
        db.execute("UPDATE meta SET schema = 2")
    db.close()


def test_a_catalog_of_schema_2(ws: Workspace) -> None:
    ws.ingest([row("How much?", "one"), row("How much?", "two"), row("x", "x"), row("something else")], task="a")
    ws.ingest([row("something else", "no")], task="a")
    before = quarantine.listed(ws)
    made_by_schema_2(ws)
    ws = Workspace(ws.root)
    after = quarantine.listed(ws)
    assert [e | {"reason": ""} for e in after] == [e | {"reason": ""} for e in before]
    assert "xyzzy" not in json.dumps(after)
    with sqlite3.connect(ws.root / "treering.db") as db:
        assert db.execute("SELECT rows, counts FROM words").fetchall() == [(2, '{"else": 2, "something": 2}')]
        assert db.execute("SELECT schema FROM meta").fetchall() == [(SCHEMA,)]
    db.close()
    quarantine.release(ws, [after[-1]["number"]])
    ws.ingest([row("y", "y")], task="a")
    assert numbers(ws)[-1] > after[-1]["number"]


@pytest.mark.parametrize("copied", [False, True])
def test_a_number_of_quarantine_never_comes_again(ws: Workspace, tmp_path: Path, copied: bool) -> None:
    ws.ingest([row("x", "x"), row("y", "y")], task="a")
    ws.forget(where="text~y")
    if copied:
        ws.catalog.copy(tmp_path / "treering.db")
        ws.catalog.engine.dispose()
        (tmp_path / "treering.db").replace(ws.root / "treering.db")
        ws = Workspace(ws.root)
    ws.ingest([row("z", "z")], task="a")
    assert numbers(ws) == [1, 3]


def test_a_newer_catalog_is_refused(ws: Workspace) -> None:
    ws.ingest([row("something")], task="a")
    ws.catalog.engine.dispose()
    with sqlite3.connect(ws.root / "treering.db") as db:
        db.execute("UPDATE meta SET schema = schema + 1")
    db.close()
    with pytest.raises(TreeringError, match=f"newer than {SCHEMA}: update treering"):
        Workspace(ws.root).ingest([row("more")], task="a")


def test_a_catalog_of_schema_3(ws: Workspace) -> None:
    turns = [{"role": ("user", "assistant")[at % 2], "content": f"{word} of it"} for at, word in enumerate("abcdef")]
    rows: list[Mapping[str, object]] = [{"messages": turns}, row("something else")]
    ws.ingest(rows, task="a")
    ws.catalog.engine.dispose()
    del ws.catalog
    with sqlite3.connect(ws.root / "treering.db") as db:
        db.execute("DROP TABLE within")
        db.execute("ALTER TABLE meta DROP COLUMN root")
        db.execute("UPDATE meta SET schema = 3")
    db.close()
    for run in (ws.root / "near").iterdir():
        (run / "places.npy").rename(run / "owners.npy")
    found = Workspace(ws.root).ingest([], task="a", held_out=[{"messages": turns[:4]}])
    assert (found.accepted, found.withdrawn) == (1, 1)
