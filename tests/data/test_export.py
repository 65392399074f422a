"""Rows out again: what comes back has the ids that went out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering import Workspace
from treering.data.example import Example
from treering.data.export import FORMATS, export
from treering.data.shapes import convert
from treering.data.tombstones import marks
from treering.errors import UsageError

MakeWorkspace = Callable[..., Workspace]

ROWS: list[dict[str, Any]] = [
    {"text": "where is it", "label": "order_status"},
    {"instruction": "sum up", "input": "a text,\nof two lines", "output": "short", "system": "be brief"},
    {"instruction": "and then?", "output": "end", "history": [["begin", "once"], ["go on", "twice"]]},
    {"question": "可以退款吗", "answer": "可以的"},
]
TOOL: dict[str, Any] = {
    "conversations": [
        {"from": "human", "value": "how warm is it"},
        {"from": "observation", "value": "21"},
        {"from": "gpt", "value": "21 degrees"},
    ]
}


def ids(ws: Workspace) -> set[str]:
    return {id for rows in (ws.catalog.waiting(()), ws.catalog.held_out()) for found in rows.values() for id in found}


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    made = workspace(val_size=0.0)
    assert made.ingest([*ROWS, TOOL], task="shop").accepted == 5
    made.ingest([{"text": "other", "label": "row"}], task="other", held_out=[{"text": "kept", "label": "aside"}])
    return made


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("openai", "a.jsonl"),
        ("openai", "a.json"),
        ("sharegpt", "a.json"),
        ("sharegpt", "a.jsonl"),
        ("parquet", "a.parquet"),
    ],
)
def test_there_and_back(ws: Workspace, workspace: MakeWorkspace, tmp_path: Path, format: str, name: str) -> None:
    done = export(ws, tmp_path / name, format)
    assert (done["rows"], done["left_out"]) == (6, {})
    again = workspace("again", val_size=0.0)
    assert again.ingest(tmp_path / name, task="shop").accepted == 6
    assert ids(again) == ids(ws) - set(ws.catalog.held_out()["other"])


@pytest.mark.parametrize("format", ["openai", "parquet", "sharegpt", "alpaca"])
def test_a_turn_of_weight_0_is_never_one_to_learn(workspace: MakeWorkspace, tmp_path: Path, format: str) -> None:
    said = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "qbra", strict=True)]
    rows: list[dict[str, Any]] = [{"messages": [said[0], {**said[1], "weight": 0}, *said[2:]]}, ROWS[0]]
    made, again = workspace(val_size=0.0), workspace("again", val_size=0.0)
    assert made.ingest(rows, task="shop").accepted == 2
    file = tmp_path / ("a.parquet" if format == "parquet" else "a.json")
    done = export(made, file, format)
    if format in ("openai", "parquet"):
        again.ingest(file, task="shop")
        assert ids(again) == ids(made)
    else:
        assert done["left_out"] == {"a turn is not to be learned (weight 0)": 1}


def test_alpaca_leaves_out_what_it_cannot_say(ws: Workspace, workspace: MakeWorkspace, tmp_path: Path) -> None:
    done = export(ws, tmp_path / "a.json", "alpaca", task="shop")
    assert (done["rows"], done["left_out"]) == (4, {"it has a tool's turn": 1})
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert rows[2]["history"] == [["begin", "once"], ["go on", "twice"]] and rows[1]["system"] == "be brief"
    again = workspace("again", val_size=0.0)
    again.ingest(tmp_path / "a.json", task="shop")
    assert ids(again) == {convert(row).id for row in ROWS}


def test_one_side_of_one_task(ws: Workspace, tmp_path: Path) -> None:
    assert export(ws, tmp_path / "a.jsonl", "openai", task="other", split="held_out")["rows"] == 1
    assert json.loads((tmp_path / "a.jsonl").read_text())["messages"][0]["content"] == "kept"
    assert export(ws, tmp_path / "a.jsonl", "openai", task="other")["rows"] == 1  # What was there is replaced.
    assert json.loads((tmp_path / "a.jsonl").read_text())["messages"][0]["content"] == "other"


def test_many_rows(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([{"text": f"question {number}", "label": "yes"} for number in range(1201)], task="a")
    assert export(ws, tmp_path / "a.parquet", "parquet")["rows"] == 1201
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 1201


@pytest.mark.parametrize(
    ("name", "format", "task", "words"),
    [
        ("a.json", "orca", None, "'orca' is not known"),
        ("a.json", "parquet", None, r"ends in \.parquet"),
        ("a.parquet", "alpaca", None, r"ends in \.json or \.jsonl"),
        ("none/a.json", "alpaca", None, "no file in an existing folder"),
        ("a.json", "alpaca", "hats", "no train rows of task 'hats' are stored; tasks with such rows: 'shop', 'other'"),
    ],
)
def test_what_cannot_be_written(
    ws: Workspace, tmp_path: Path, name: str, format: str, task: str | None, words: str
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=words):
        export(ws, tmp_path / name, format, task)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_that_can_be_said_leaves_no_file(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0)
    ws.ingest([TOOL], task="a")
    (tmp_path / "a.json").write_text("before")
    with pytest.raises(UsageError, match="none of the 1 rows can be said in alpaca: it has a tool's turn"):
        export(ws, tmp_path / "a.json", "alpaca")
    assert (tmp_path / "a.json").read_text() == "before"
    assert not list(tmp_path.glob("*.partial"))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(str.strip)
middle = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": texts.filter(bool)})
last = st.tuples(texts, texts.filter(bool)).map(
    lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
)
system = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": texts.filter(bool)}), max_size=1)
rows = st.tuples(system, st.lists(middle, max_size=4), last).map(lambda parts: [t for part in parts for t in part])


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(row=rows, format=st.sampled_from(sorted(FORMATS)))
def test_what_is_said_in_a_format_is_the_same_row(row: list[dict[str, str]], format: str) -> None:
    example = Example.of(row)
    said = FORMATS[format](example)
    if isinstance(said, str):
        assert format in ("alpaca", "text")
        return
    assert convert(json.loads(json.dumps(said))).id == example.id


name = st.text(st.characters(categories=["Ll"]), min_size=1, max_size=6)
call = st.fixed_dictionaries(
    {
        "id": name,
        "function": st.fixed_dictionaries({"name": name, "arguments": st.dictionaries(name, texts, max_size=2)}),
    }
)
exchange = st.tuples(st.lists(call, min_size=1, max_size=2), texts.filter(bool), name).map(
    lambda parts: [
        {"role": "assistant", "content": None, "tool_calls": parts[0]},
        {"role": "tool", "content": parts[1], "name": parts[2], "tool_call_id": parts[0][0]["id"]},
    ]
)
offer = st.lists(st.fixed_dictionaries({"name": name, "parameters": st.just({"type": "object"})}), max_size=2)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(first=system, asked=texts, calls=exchange, end=last, tools=offer, format=st.sampled_from(sorted(FORMATS)))
def test_a_deletion_knows_a_row_in_every_format(
    first: list[dict[str, str]],
    asked: str,
    calls: list[dict[str, Any]],
    end: list[dict[str, str]],
    tools: list[dict[str, Any]],
    format: str,
) -> None:
    turns = [*first, {"role": "user", "content": asked}, *calls, *end]
    example = convert({"messages": turns, "tools": tools})
    said = FORMATS[format](example)
    if isinstance(said, str):
        assert format in ("alpaca", "text")
        return
    back = convert(json.loads(json.dumps(said)))
    assert marks(back)[1] == marks(example)[1]
    assert back.id == example.id or format == "sharegpt"
