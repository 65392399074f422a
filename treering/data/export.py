"""Stored rows out again, in a format that other tools read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from treering.data.example import REJECTED, Example, Message
from treering.data.read import Row, read
from treering.data.tools import CALLED, OFFERED, compact
from treering.data.writer import Split
from treering.errors import UsageError, full_disk_is_clear
from treering.files import append_line, replacing, sha256, timestamp, whole_lines

if TYPE_CHECKING:
    from treering.workspace import Workspace

_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
_CHUNK = 500

NOTES = "exports.jsonl"
"""What was exported, in the workspace: a line a file."""


def export(ws: Workspace, target: Path, format: str, task: str | None = None, split: Split = "train") -> dict[str, Any]:
    """Write the rows of `split` (of `task`) to `target`, all or nothing; what the format cannot say is counted.

    It is noted, so that rows which are deleted later can be taken out of the file again. Raises `UsageError` where
    there is nothing to write, or no place for it.
    """
    ending = target.suffix.lower()
    known = (".parquet",) if format == "parquet" else (".json", ".jsonl")
    if format not in FORMATS:
        raise UsageError(f"--format {format!r} is not known; it is one of {', '.join(FORMATS)}")
    if ending not in known:
        raise UsageError(f"--out {target}: a file of format {format} ends in {' or '.join(known)}; name it so")
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"--out {target} is no file in an existing folder; name one")
    found = ws.catalog.held_out() if split == "held_out" else ws.catalog.waiting(())
    ids = [id for name, rows in found.items() if task in (None, name) for id in rows]
    if not ids:
        of = f" of task {task!r}" if task else ""
        tasks = ", ".join(map(repr, found)) or "none"
        raise UsageError(f"no {split} rows{of} are stored; tasks with such rows: {tasks}")
    left: dict[str, int] = {}
    with full_disk_is_clear(target.parent), full_disk_is_clear(ws.root):
        with replacing(target) as file:
            _WRITERS[ending](file, _converted(_stored(ws, ids), format, left))
            written = len(ids) - sum(left.values())
            if not written:
                raise UsageError(f"none of the {len(ids)} rows can be said in {format}: {', '.join(left)}")
        _note(ws, target.resolve(), format)
    return {"rows": written, "left_out": left, "format": format, "split": split, "out": str(target)}


def without(ws: Workspace, is_gone: Callable[[str], bool]) -> tuple[list[str], dict[str, str]]:
    """Take rows whose ids are gone out of all files that `export` wrote.

    Returns the files that were written anew, and those that may still have such rows, each with the reason.
    """
    notes = {note["path"]: note for note in (json.loads(line) for _, line in whole_lines(ws.root / NOTES))}
    done, kept = list[str](), dict[str, str]()
    for name, note in notes.items():
        path = Path(name)
        try:
            if not path.exists() or not any(is_gone(example.id) for example in _read(path)):
                continue
            if sha256(path) != note["sha256"]:
                kept[name] = "it was changed since it was exported; delete the rows, or the file, by hand"
                continue
            with replacing(path) as file:
                left = (example for example in _read(path) if not is_gone(example.id))
                _WRITERS[path.suffix.lower()](file, _converted(left, note["format"], {}))
            _note(ws, path, note["format"])
        except OSError as error:
            kept[name] = f"it cannot be written anew ({error.strerror}); delete the rows, or the file, by hand"
        else:
            done.append(name)
    return done, kept


def _note(ws: Workspace, path: Path, format: str) -> None:
    append_line(ws.root / NOTES, {"time": timestamp(), "path": str(path), "format": format, "sha256": sha256(path)})


def _read(path: Path) -> Iterator[Example]:
    return (row.example for row in read(path, pairs=True, note=lambda _: None) if isinstance(row, Row))


def _stored(ws: Workspace, ids: list[str]) -> Iterator[Example]:
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        examples = ws.catalog.examples(part)
        yield from (examples[id] for id in part)


def _converted(examples: Iterable[Example], format: str, left: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The rows in that format; `left` counts those it cannot say, by the reason."""
    for example in examples:
        row = "it is plain text" if example.is_text and format != "text" else _as_pair(example, format)
        if isinstance(row, str):
            left[row] = left.get(row, 0) + 1
        else:
            yield row


def text(example: Example) -> dict[str, Any] | str:
    """The row as `text`, or why that is not possible."""
    return {"text": example.answer} if example.is_text else "it is no plain text"


def openai(example: Example) -> dict[str, Any]:
    """The row as `messages`, with its `tools` beside them."""
    turns, tools = _apart(example)
    return {"messages": turns, **({OFFERED: tools} if tools else {})}


def sharegpt(example: Example) -> dict[str, Any] | str:
    """The row as `conversations`, with its `tools` as JSON; or why that is not possible."""
    turns, tools = _apart(example)
    if any(CALLED in turn and turn["content"] for turn in turns):
        return "a turn has a call beside its text"
    said = [
        {"from": "function_call", "value": compact([call["function"] for call in turn[CALLED]])}
        if CALLED in turn
        else {"from": _SHAREGPT[turn["role"]], "value": turn["content"]}
        for turn in turns
    ]
    return {"conversations": said, **({OFFERED: compact([tool["function"] for tool in tools])} if tools else {})}


def parquet(example: Example) -> dict[str, Any]:
    """As `openai`, with calls and tools as JSON, so that all rows have the same columns."""
    turns, tools = _apart(example)
    said = [{**turn, **({CALLED: compact(turn[CALLED])} if CALLED in turn else {})} for turn in turns]
    return {"messages": said, OFFERED: compact(tools) if tools else None}


def _as_pair(example: Example, format: str) -> dict[str, Any] | str:
    """The row, with `chosen` and `rejected` where it is a preference pair."""
    other = example.rejected
    if other is None:
        return FORMATS[format](example)
    last = example.messages[-1].as_dict()
    del last[REJECTED]
    chosen = Example((*example.messages[:-1], Message.of(last)))
    one, two = FORMATS[format](chosen), FORMATS[format](other)
    if isinstance(one, str) or isinstance(two, str):
        return one if isinstance(one, str) else str(two)
    if format == "alpaca":
        return {**one, "output": None, "chosen": one["output"], "rejected": two["output"]}
    if format not in ("openai", "sharegpt"):
        return "it is a preference pair"
    key, asked = ("messages", "prompt") if format == "openai" else ("conversations", "conversations")
    rest = {name: value for name, value in one.items() if name != key}
    *before, said = one[key]
    answers = (said, two[key][-1])
    chosen_turn, rejected_turn = ([turn] for turn in answers) if format == "openai" else answers
    return {**rest, asked: before, "chosen": chosen_turn, "rejected": rejected_turn}


def _apart(example: Example) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The turns, and the tools that they may call."""
    turns = example.as_dicts()
    tools = turns[0].pop(OFFERED, [])
    return (turns[1:] if tools and not turns[0]["content"] else turns), tools


def alpaca(example: Example) -> dict[str, Any] | str:
    """The row as instruction, input and output, earlier turns as history; or why that is not possible."""
    turns = list(example.messages)
    system = turns.pop(0).content if turns[0].role == "system" else ""
    roles = [turn.role for turn in turns]
    if "tool" in roles or example.tells_more:
        return "it has a tool's turn"
    if roles != ["user", "assistant"] * (len(turns) // 2):
        return "user and assistant do not take turns"
    texts = [turn.content for turn in turns]
    history = [[asked, answered] for asked, answered in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return {"instruction": texts[-2], "input": "", "output": texts[-1], "system": system, "history": history}


FORMATS: dict[str, Callable[[Example], dict[str, Any] | str]] = {
    "text": text,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "openai": openai,
    "parquet": parquet,
}


def _write_lines(file: BinaryIO, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(_as_json(row) + b"\n")


def _write_json(file: BinaryIO, rows: Iterable[dict[str, Any]]) -> None:
    before = b"[\n"
    for row in rows:
        file.write(before + _as_json(row))
        before = b",\n"
    file.write(b"\n]\n")


def _write_parquet(file: BinaryIO, rows: Iterable[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    turn = pa.struct([(key, pa.string()) for key in ("role", "content", CALLED, "tool_call_id", "name")])
    schema = pa.schema([("messages", pa.list_(turn)), (OFFERED, pa.string())])
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(file, schema) as writer:
        for row in rows:
            waiting.append(row)
            if len(waiting) == _CHUNK:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting.clear()
        writer.write_table(pa.Table.from_pylist(waiting, schema))


_WRITERS = {".parquet": _write_parquet, ".json": _write_json, ".jsonl": _write_lines}


def _as_json(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()
