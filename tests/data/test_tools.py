"""Tools and calls of them: kept from every format, said by every template, and written out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace
from treering.data.example import Example, Message
from treering.data.export import export
from treering.data.shapes import convert
from treering.data.values import RowError
from treering.model import encode, load_tokenizer
from treering.rendering import rendered

MakeWorkspace = Callable[..., Workspace]

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ROW: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "dry"},
        {"role": "assistant", "content": "No."},
    ],
    "tools": [TOOL],
}
SHAREGPT: dict[str, Any] = {
    "conversations": [
        {"from": "human", "value": "Rain in Oslo?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "dry"},
        {"from": "gpt", "value": "No."},
    ],
    "system": "Be brief.",
    "tools": json.dumps([TOOL["function"]]),
}
SAID = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
KNOWS_TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }}{% endfor %}]{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }}){% endfor %};{% endfor %}"
)


def texts(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in example.messages]


def trained(ws: Workspace) -> list[list[tuple[str, str]]]:
    return sorted(texts(example) for example in ws.catalog.examples(ws.catalog.train_ids("weather")).values())


@pytest.mark.parametrize("row", [ROW, SHAREGPT], ids=["openai", "sharegpt"])
def test_tools_and_calls_are_kept(row: dict[str, Any]) -> None:
    found = texts(convert(row))
    assert found[0][0] == "system" and found[0][1].startswith("Be brief.\nThese functions")
    assert '{"name": "weather", "parameters": {"type": "object"}}' in found[0][1]
    assert found[1:] == [("user", "Rain in Oslo?"), ("assistant", SAID), ("tool", "dry"), ("assistant", "No.")]
    assert Example.of(convert(row).as_dicts()) == convert(row)


def test_arguments_are_written_as_openai_has_them(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(val_size=0.0)
    no_arguments = {**CALL, "function": {"name": "weather", "arguments": "{}"}}
    asked = {"role": "user", "content": "Rain?"}
    other = {"messages": [asked, {"role": "assistant", "tool_calls": [CALL, no_arguments]}], "tools": [TOOL]}
    ws.ingest([ROW, other], task="weather")
    export(ws, tmp_path / "rows.jsonl", "openai")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    calls = [call["function"] for row in rows for turn in row["messages"] for call in turn.get("tool_calls", ())]
    assert [call["arguments"] for call in calls] == ['{"city": "Oslo"}', '{"city": "Oslo"}', "{}"]
    assert [convert(row) for row in rows] == [convert(ROW), convert(other)]


def test_a_call_may_be_the_answer() -> None:
    row = {"messages": ROW["messages"][:3], "tools": [TOOL]}
    assert convert(row).answer == SAID
    other = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Bergen"}'}}
    changed = {**row, "messages": [*ROW["messages"][:2], {**ROW["messages"][2], "tool_calls": [other]}]}
    assert convert(changed).id != convert(row).id
    assert convert({**row, "tools": None}).id != convert(row).id


def test_tools_need_no_system_turn_and_a_default_one_fills_it() -> None:
    row = {"messages": ROW["messages"][1:], "tools": [TOOL]}
    assert convert(row).messages[0].content == ""
    assert convert(row, system="Say no more.").messages[0].content == "Say no more."


def test_nulls_of_a_table_are_no_arguments() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Oslo", "day": None}}, "id": None}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "tool_call_id": None}
    assert convert({"messages": [ROW["messages"][1], turn], "tools": None}).answer == SAID


def test_a_template_that_knows_tools_writes_them_itself(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder, False)
    tokenizer.chat_template = KNOWS_TOOLS
    said = rendered(tokenizer, convert(ROW).as_dicts(), open_answer=False)
    assert said == "[weather]system:Be brief.;user:Rain in Oslo?;assistant:weather(Oslo);tool:dry;assistant:No.;"
    without = convert({**ROW, "messages": ROW["messages"][1:]}).as_dicts()
    assert rendered(tokenizer, without, open_answer=False).startswith("[weather]user:")


def test_another_template_gets_them_as_text(model_folder: Path) -> None:
    tokenizer = load_tokenizer(model_folder, False)
    said = rendered(tokenizer, convert(ROW).as_dicts(), open_answer=False)
    assert f"<|im_start|>assistant\n{SAID}<|im_end|>" in said and "<tools>\n" in said
    row = encode(tokenizer, convert(ROW))
    assert SAID in tokenizer.decode([row.ids[place] for place in row.answers])


def test_they_come_through_an_update_and_out_again(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(max_steps=1, val_size=0.2)
    rows = []
    for number in range(10):
        asked = {"role": "user", "content": f"Rain in town {number}?"}
        rows.append({**ROW, "messages": [ROW["messages"][0], asked, *ROW["messages"][2:]]})
    assert ws.ingest(rows, task="weather").accepted == 10
    assert ws.update() is not None
    for name, format in (("o.jsonl", "openai"), ("p.parquet", "parquet"), ("s.json", "sharegpt")):
        done = export(ws, tmp_path / name, format)
        assert (done["rows"], done["left_out"]) == (8, {})
        other = workspace(f"ws-{format}", val_size=0.0)
        other.ingest(tmp_path / name, task="weather")
        assert trained(other) == trained(ws)
    with pytest.raises(Exception, match="it has a tool's turn"):
        export(ws, tmp_path / "a.json", "alpaca")


def test_marks_of_the_chat_format_are_neutral_in_calls_and_tools_too(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0)
    bad = {**CALL, "function": {"name": "weather", "arguments": {"city": "Oslo<|im_end|>"}}}
    messages = [ROW["messages"][1], {"role": "assistant", "content": "", "tool_calls": [bad]}]
    assert ws.ingest([{"messages": messages}], task="t").mended == {"special-tokens": 1}
    [example] = ws.catalog.examples(ws.catalog.train_ids("t")).values()
    assert "Oslo< |im_end|>" in example.answer


def test_a_turn_without_extras_is_as_it_always_was() -> None:
    example = Example((Message("user", "q"), Message("assistant", "a")))
    assert example.id == "203f215c9a96f6f045cb11a70aa38861"
    assert example.as_dicts() == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


DEEP: Any = 1
for _ in range(60):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("value", "words"), [(DEEP, "nested more than 50 deep"), ({"a": "\ud800"}, "half of a character")]
)
def test_calls_and_tools_that_nothing_could_hold(value: object, words: str) -> None:
    asked = ROW["messages"][1]
    call = {"function": {"name": "weather", "arguments": value}}
    with pytest.raises(RowError, match=words):
        convert({"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    with pytest.raises(RowError, match=words):
        convert({"messages": [asked, ROW["messages"][4]], "tools": [{"name": "f", "parameters": value}]})


def test_tools_without_end_are_refused_without_counting(workspace: MakeWorkspace) -> None:
    ws = workspace(val_size=0.0, cutoff_len=64)
    tool = {"name": "f", "description": "x" * 5000}
    found = ws.ingest([{"messages": [ROW["messages"][1], ROW["messages"][4]], "tools": [tool]}], task="t")
    assert "characters are far more than cutoff_len=64" in found.refused[0]["reason"]
