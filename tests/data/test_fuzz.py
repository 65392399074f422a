"""Thousands of damaged files through the real ingest: never an exception, and every row is somewhere."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzzing
from tests.fuzzing import made
from treering import Workspace
from treering.data.intake import Ingested
from treering.data.names import KNOWN_KEYS
from treering.data.read import Bad, Row, read
from treering.data.records import container_of
from treering.data.shapes import NAMED, convert
from treering.data.values import RowError
from treering.errors import UsageError

MakeWorkspace = Callable[..., Workspace]
Record = Callable[[str, object], None]

AT_ONCE = 25
"""Files that one ingest takes."""


def stored(ws: Workspace) -> Counter[str]:
    """What the catalog holds, counted past all that treering says of it."""
    counts: Counter[str] = Counter()
    with sqlite3.connect(ws.root / "treering.db") as db:
        for split, count in db.execute("SELECT split, count(*) FROM rows GROUP BY split"):
            counts["rows"] += count
            counts["superseded"] += count if split.startswith("superseded:") else 0
        (counts["quarantined"],) = db.execute("SELECT count(*) FROM quarantine").fetchone()
        (counts["left out"],) = db.execute("SELECT count(*) FROM duplicates").fetchone()
    return counts


def taken(ws: Workspace, folder: Path, task: str) -> Ingested:
    """One ingest, whose figures must be what the catalog has more than before."""
    before = stored(ws)
    found = ws.ingest(folder, task=task)
    after = stored(ws)
    assert found.rows == found.accepted + found.duplicates + found.quarantined
    assert sum(found.tasks.values()) == found.accepted and sum(found.reasons.values()) == found.quarantined
    assert {key: after[key] - before[key] for key in after} == {
        "rows": found.accepted - found.restored,
        "superseded": found.superseded - found.restored,
        "quarantined": found.quarantined,
        "left out": found.near,
    }
    return found


# How many rows a file has, counted without treering


def counted(file: Path) -> int | None:
    """Its rows; None where that depends on how it is read, so that another count proves nothing."""
    content = file.read_bytes()
    try:
        container = container_of(file)
        if container == "parquet":
            return int(pq.read_metadata(file).num_rows)
        if container == "arrow":
            return _of_arrow(content)
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        elif file.suffix == ".zst":
            with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
                content = stream.read()
        text = _decoded(content)
    except (RowError, OSError, EOFError, ValueError, zlib.error, pa.ArrowException):
        return None
    if container == "txt":
        return None
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if container in ("csv", "tsv"):
        sure = '"' not in text and all(line.strip(" ,;\t") for line in lines)
        return len(lines) - 1 if lines and sure else None
    return _of_json(text, lines)


def _of_arrow(content: bytes) -> int:
    if content.startswith(b"ARROW1"):
        reader = pa.ipc.open_file(content)
        return sum(reader.get_batch(place).num_rows for place in range(reader.num_record_batches))
    return sum(batch.num_rows for batch in pa.ipc.open_stream(content))


def _decoded(content: bytes) -> str:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("gb18030")


def _of_json(text: str, lines: list[str]) -> int | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None if not lines or lines[0].strip().startswith("[") else _of_lines(lines)
    if isinstance(found, list):
        return len(found)
    return None if isinstance(found, dict) and found.keys() & {"data", "train", "rows"} else 1


def _of_lines(lines: list[str]) -> int:
    rows = at = 0
    while at < len(lines):
        rows += 1
        at += _laid_out(lines[at:])
    return rows


def _laid_out(lines: list[str]) -> int:
    """Over how many lines the first row is: one, but where it becomes an object with some that begin none."""
    for end, line in enumerate(lines, 1):
        if line.startswith("{") != (end == 1):
            break
        with suppress(ValueError, RecursionError):
            if isinstance(json.loads("\n".join(lines[:end])), dict):
                return end
    return 1


def items_of(file: Path) -> list[Row | Bad]:
    """What is read of a file, after it was compared to its rows as counted without treering."""
    found = list(read(file, note=lambda _: None))
    assert found, f"{file.name}: nothing came of it"
    whole = [item for item in found if isinstance(item, Bad) and item.line == 0]
    assert all(len(item.raw) <= 2000 and (item.raw + item.reason).encode() for item in found if isinstance(item, Bad))
    wanted = counted(file)
    if not whole:
        assert wanted is None or len(found) == wanted, f"{file.name}: {len(found)} of {wanted} rows"
    return found


# The test


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    made_now = workspace()
    assert made_now.catalog.counts()["train"] == 0  # Makes the tables.
    return made_now


def fuzz(ws: Workspace, numbers: range, folder: Path) -> Iterator[Ingested]:
    """Make the files of these numbers and take them in, some at once."""
    for start in range(numbers.start, numbers.stop, AT_ONCE):
        here = folder / f"{start}"
        here.mkdir()
        files = [made(random.Random(f"fuzz:{number}"), number) for number in range(start, start + AT_ONCE)]
        for file in files:
            (here / file.name).write_bytes(file.content)
        rows = sum(len(items_of(here / file.name)) for file in files)
        found = taken(ws, here, f"task {start % 100}")
        assert found.rows == rows
        shutil.rmtree(here)
        yield found


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def run_folders(ws: Workspace, folder: Path, count: int) -> Counter[str]:
    """Fuzz folders that describe themselves; returns how many were taken in, and how many refused as a whole."""
    ended: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"folder:{number}")
        here, (files, damaged) = folder / f"saved {number}", fuzzing.saved_dataset(rng)
        put(here, files)
        found = taken(ws, here, "saved")
        rows = {name: len(items_of(here / name)) for name in files if name.endswith(".arrow")}
        spare = found.rows - sum(rows.values())
        assert spare == 0 or damaged in ("state.json", "dataset_info.json")
        assert spare >= 0, f"{number}: of {rows} {found.rows} were read"
        here = put(folder / f"listed {number}", fuzzing.listed_files(rng))
        before = stored(ws)
        try:
            rows_in_all, why = taken(ws, here, "listed").rows, ""
        except UsageError as error:
            rows_in_all, why = 0, str(error)
        assert rows_in_all >= 2 or ("dataset_info.json" in why and stored(ws) == before)
        ended["refused" if why else "taken"] += 1
        shutil.rmtree(folder / f"saved {number}")
        shutil.rmtree(here)
    return ended


def run_lines(ws: Workspace, folder: Path, count: int) -> None:
    """Fuzz files of lines, one line each: all others are taken in."""
    for start in range(0, count, AT_ONCE):
        here, wanted = folder / f"lines {start}", list[str]()
        here.mkdir()
        for number in range(start, start + AT_ONCE):
            file, lines, place = fuzzing.line_file(random.Random(f"line:{number}"), number)
            (here / file.name).write_bytes(file.content)
            found = {item.line: item for item in items_of(here / file.name)}
            first = 2 if file.name.endswith(fuzzing.TABLES) else 1
            assert set(range(first, lines + 1)) - {place + 1} <= found.keys(), file
            others = [found[line] for line in found if line != place + 1]
            assert all(isinstance(item, Row) for item in others), file
            wanted += [item.example.id for item in others if isinstance(item, Row)]
        taken(ws, here, "lines")
        assert {row["id"] for row in ws.catalog.rows(wanted)} == set(wanted)
        shutil.rmtree(here)


def run(ws: Workspace, folder: Path, numbers: range, record_property: Record) -> Counter[str]:
    """Fuzz, and record and print what came of it."""
    counts: Counter[str] = Counter()
    rules: Counter[str] = Counter()
    for found in fuzz(ws, numbers, folder):
        counts.update(rows=found.rows, accepted=found.accepted, duplicates=found.duplicates)
        counts.update(quarantined=found.quarantined)
        rules.update(found.reasons)
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    record_property("files", f"{len(numbers):,}")
    record_property("rows", told)
    record_property("rules", ", ".join(f"{count:,} {name}" for name, count in rules.most_common()))
    assert counts["rows"] == counts["accepted"] + counts["duplicates"] + counts["quarantined"]
    ended = run_folders(ws, folder, len(numbers) // 20)
    run_lines(ws, folder, len(numbers) // 4)
    record_property("lists", ", ".join(f"{count:,} {name}" for name, count in ended.items()))
    ws.catalog.check()
    return rules


def test_some_damaged_files(ws: Workspace, tmp_path: Path, record_property: Record) -> None:
    rules = run(ws, tmp_path, range(300), record_property)
    assert len(rules) >= 10


@pytest.mark.soak
def test_ten_thousand_damaged_files(ws: Workspace, tmp_path: Path, record_property: Record) -> None:
    run(ws, tmp_path, range(300, 10_300), record_property)


KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "label", "system", "history", "chosen", "问题"]
)
LEAVES = st.text() | st.sampled_from(["user", "assistant", "\ud800"])
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.dictionaries(st.sampled_from(sorted(KNOWN_KEYS)) | st.text(max_size=3), ANY, max_size=5)


@settings(max_examples=300)
@given(record=RECORDS | ANY, shape=st.none() | st.sampled_from(sorted(NAMED)), need_answer=st.booleans())
def test_any_json_is_an_example_or_a_reason(record: object, shape: str | None, need_answer: bool) -> None:
    with suppress(RowError):
        example = convert(record, need_answer=need_answer, shape=shape)
        assert example.messages and example.id and (not need_answer or example.answer)
