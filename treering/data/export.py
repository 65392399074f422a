"""Stored rows out again, in a format that other tools read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from treering.data.example import REJECTED, WEIGHT, Example, Message
from treering.data.records import Found, records
from treering.data.shapes import PLAIN, convert, is_plain_text
from treering.data.tombstones import Tombstones
from treering.data.tools import CALLED, OFFERED, compact
from treering.data.values import RowError
from treering.data.writer import Split
from treering.errors import TreeringError, UsageError, full_disk_is_clear
from treering.files import append_line, partial_of, replacing, sha256, timestamp, whole_lines

if TYPE_CHECKING:
    from treering.workspace import Workspace

_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
_CHUNK = 500

NOTES = "exports.jsonl"
"""What was exported, in the workspace: two lines a file, one before it is written and one, with its hash, after."""

QUARANTINED = "quarantine"
"""The format in which `quarantine export` writes, line by line."""


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
    with full_disk_is_clear(target.parent), full_disk_is_clear(ws.root), noted(ws, target, format) as file:
        _WRITERS[ending](file, _converted(_stored(ws, ids), format, left))
        written = len(ids) - sum(left.values())
        if not written:
            raise UsageError(f"none of the {len(ids)} rows can be said in {format}: {', '.join(left)}")
    return {"rows": written, "left_out": left, "format": format, "split": split, "out": str(target)}


@contextmanager
def noted(ws: Workspace, target: Path, format: str) -> Iterator[BinaryIO]:
    """`replacing`, for a file that deletions have to find: noted before there is any of it, and what it holds before
    it has its name.

    Raises `UsageError` where rows were deleted while it was written: it may have them.
    """
    path = target.parent.resolve() / target.name  # A link of that name is replaced, not followed.
    deleted = len(Tombstones(ws.root))
    met = UsageError(f"{target} was not written, for rows were deleted meanwhile; export them again")
    _note(ws, path, format, None)
    try:
        with replacing(path) as file:
            yield file
            file.flush()
            _note(ws, path, format, sha256(partial_of(path)))
            if len(Tombstones(ws.root)) != deleted:
                raise met
    except (FileNotFoundError, TreeringError) as error:
        # A deletion that comes behind the look takes the file before it has its name.
        if not isinstance(error, FileNotFoundError) and len(Tombstones(ws.root)) == deleted:
            raise
        raise met from None


def without(ws: Workspace, stones: Tombstones) -> tuple[list[str], dict[str, str]]:
    """Take deleted rows out of all files that were `noted`, and what is left of such as a crash cut off.

    Returns the files that were written anew, and those that may still have such rows, each with the reason.
    """
    notes: dict[str, list[dict[str, Any]]] = {}
    for _, line in whole_lines(ws.root / NOTES):
        note = json.loads(line)
        notes.setdefault(str(ws.root / note["path"]), []).append(note)
    done, kept = list[str](), dict[str, str]()
    for name, of in notes.items():
        path, format, known = Path(name), of[-1]["format"], {note["sha256"] for note in of}
        try:
            _clear(partial_of(path), of[-1]["sha256"])
            if not path.exists():
                continue
            gone = Counter(_is_gone(found, stones) for found in _records(path, format))
            if gone[None]:
                kept[name] = f"{gone[None]} of its rows cannot be read; look for yourself"
            if gone[True] and sha256(path) not in known:
                kept[name] = "it is not as it was exported; delete the rows, or the file, by hand"
            elif gone[True]:
                with noted(ws, path, format) as file:
                    left = (found.value for found in _records(path, format) if not _is_gone(found, stones))
                    _WRITERS[_ending(path, format)](file, cast("Iterator[dict[str, Any]]", left))
                done.append(name)
        except OSError as error:
            kept[name] = (
                f"it cannot be read, or not be written anew ({error.strerror}); delete it, or its rows, by hand"
            )
        except RowError as error:
            kept[name] = f"it cannot be read ({error.reason}); look for yourself"
    return done, kept


def _ending(path: Path, format: str) -> str:
    return ".jsonl" if format == QUARANTINED else path.suffix.lower()


def _records(path: Path, format: str) -> Iterator[Found]:
    return records(path, "jsonl" if format == QUARANTINED else None, note=lambda _: None)


def _note(ws: Workspace, path: Path, format: str, sha256: str | None) -> None:
    # Of one that lies in the workspace, and moves with it, the place there.
    name = path.relative_to(ws.root) if path.is_relative_to(ws.root) else path
    append_line(ws.root / NOTES, {"time": timestamp(), "path": str(name), "format": format, "sha256": sha256})


def _clear(partial: Path, noted: str | None) -> None:
    """Remove what an export that was cut off left; one that goes on ends then, for it may have deleted rows."""
    with suppress(FileNotFoundError):
        if noted in (None, sha256(partial)):
            partial.unlink()


def _is_gone(found: Found, stones: Tombstones) -> bool | None:
    """Whether a record of an export is of a deleted row; None: it cannot be read."""
    try:
        if found.error:
            return None
        row = found.value
        if isinstance(row, Mapping) and "raw" in row and "rule" in row:
            return stones.know(row["raw"])
        return stones.know(convert(row, pairs=True, shape=PLAIN if is_plain_text(row) else None))
    except RowError:
        return None


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


_UNLEARNED = "a turn is not to be learned (weight 0)"


def text(example: Example) -> dict[str, Any] | str:
    """The row as `text`, or why that is not possible."""
    return {"text": example.answer} if example.is_text else "it is no plain text"


def openai(example: Example) -> dict[str, Any]:
    """The row as `messages`, with its `tools` beside them; arguments of calls are JSON text, as OpenAI has them."""
    turns, tools = _apart(example)
    for call in (call for turn in turns for call in turn.get(CALLED, ())):
        call["function"]["arguments"] = compact(call["function"]["arguments"])
    return {"messages": turns, **({OFFERED: tools} if tools else {})}


def sharegpt(example: Example) -> dict[str, Any] | str:
    """The row as `conversations`, with its `tools` as JSON; or why that is not possible."""
    turns, tools = _apart(example)
    if any(CALLED in turn and turn["content"] for turn in turns):
        return "a turn has a call beside its text"
    if not all(turn.is_learned for turn in example.messages):
        return _UNLEARNED
    said = [
        {"from": "function_call", "value": compact([call["function"] for call in turn[CALLED]])}
        if CALLED in turn
        else {"from": _SHAREGPT[turn["role"]], "value": turn["content"]}
        for turn in turns
    ]
    return {"conversations": said, **({OFFERED: compact([tool["function"] for tool in tools])} if tools else {})}


def parquet(example: Example) -> dict[str, Any]:
    """As `openai`, with tools and calls (arguments as objects) as JSON, so that all rows have the same columns."""
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
    if not all(turn.is_learned for turn in turns):
        return _UNLEARNED
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
    file.write(b"[]\n" if before == b"[\n" else b"\n]\n")


def _write_parquet(file: BinaryIO, rows: Iterable[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ("role", "content", CALLED, "tool_call_id", "name")
    turn = pa.struct([*((key, pa.string()) for key in texts), (WEIGHT, pa.int8())])
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
