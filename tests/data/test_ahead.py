"""Large files, read and checked by another process: the same comes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace
from treering.data import ahead
from treering.data.intake import Ingested
from treering.data.layout import told
from treering.data.sources import How
from treering.errors import TreeringError

MakeWorkspace = Callable[..., Workspace]

ROWS: list[Any] = [
    *({"frage": f"question {number}", "antwort": "yes"} for number in range(40)),
    {"frage": "question 3 ", "antwort": "Yes"},
    {"frage": "x", "antwort": "x"},
    {"frage": "the cafÃ© is closed", "antwort": "<p>yes</p>"},
    {"frage": "no answer"},
    "no row",
]
COLUMNS = {"question": "frage", "answer": "antwort"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


def taken(ws: Workspace, file: Path) -> Ingested:
    from treering.data.intake import ingest

    return ingest(ws, file, task="a", how=How(told(columns=COLUMNS)))


def everything(ws: Workspace) -> tuple[Any, ...]:
    ids = [id for ids in ws.catalog.waiting(()).values() for id in ids]
    held_out = [id for ids in ws.catalog.held_out().values() for id in ids]
    refused = [{**entry, "added": ""} for entry in ws.catalog.quarantined()]
    return ids, held_out, refused, ws.catalog.examples(ids)


def test_the_same_comes_of_a_file(workspace: MakeWorkspace, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treering.data.check.PART", 7)
    here, there = workspace("here"), workspace("there")
    first = taken(here, file)
    assert (first.rows, first.accepted, first.duplicates, first.quarantined) == (45, 41, 1, 3)
    assert (first.mended, first.warned) == ({"broken-encoding": 1}, {"html": 1})
    monkeypatch.setattr(ahead, "LARGE", 0)
    second = taken(there, file)
    assert dataclasses.asdict(second) == dataclasses.asdict(first)
    assert everything(there) == everything(here)


@pytest.mark.parametrize("how", ["killed", "dies"])
def test_a_reader_that_ends_too_soon_leaves_nothing(
    workspace: MakeWorkspace, file: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(ahead, "LARGE", 0)
    ws = workspace()
    started = subprocess.Popen

    def killed(*arguments: Any, **options: Any) -> Any:
        child = started(*arguments, **options)
        os.kill(child.pid, signal.SIGKILL)
        return child

    if how == "killed":
        monkeypatch.setattr(subprocess, "Popen", killed)
    else:
        plain = ahead.Job.plain.fget  # type: ignore[attr-defined]
        monkeypatch.setattr(ahead.Job, "plain", property(lambda job: {**plain(job), "config": {"lora_rank": "many"}}))
    code = {"killed": "-9", "dies": "1"}[how]
    with pytest.raises(TreeringError, match=f"was ended before the file did .exit code {code}.: nothing was taken in"):
        taken(ws, file)
    assert not any(ws.catalog.counts().values())


def test_a_reader_ends_with_who_asked_for_its_rows(
    workspace: MakeWorkspace, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "LARGE", 0)
    ws = workspace()
    children: list[Any] = []
    started = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> Any:
        children.append(started(*arguments, **options))
        return children[-1]

    def fail(*_: Any) -> Iterator[Any]:
        raise RuntimeError("power cut")

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr("treering.data.dedup.Judge.judge", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        taken(ws, file)
    assert [child.poll() is not None for child in children] == [True]
