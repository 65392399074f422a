"""Input that was made to do harm: a clear message, little memory, and nobody who waits for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_containers import bomb
from treering import Workspace
from treering.cli import run
from treering.data import check, quarantine
from treering.data.example import Example
from treering.data.read import Bad, Row, read
from treering.data.rules import RULES
from treering.errors import UsageError
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]

GOOD = b'{"text": "where is it", "label": "order status"}\n'
LINES = "".join(json.dumps(row) + "\n" for row in toy_rows("pens", 4)).encode()


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    return workspace(val_size=0.0)


# Lines and texts without end

READER = """
import resource, sys
from pathlib import Path
import pyarrow, treering.data.containers.packed
from treering.data.read import read

used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = used()
for found in read(Path(sys.argv[1])):
    print(found.line, getattr(found, "rule", "ok"))
print((used() - before) // 1024)
"""

STDIN = """
import resource, sys
from treering.cli import run

used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert run(["ingest", sys.argv[1], "--task", "t", "-w", sys.argv[2]]) == 0
before = used()
assert run(["ingest", "-", "--task", "t", "-w", sys.argv[2]]) == 0
print((used() - before) // 1024)
"""


def reading(file: Path) -> tuple[list[str], int]:
    """What a process of its own says of the rows, and the megabytes it took for them."""
    done = subprocess.run([sys.executable, "-c", READER, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *told, megabytes = done.stdout.splitlines()
    return told, int(megabytes)


def from_stdin(ws: Workspace, tmp_path: Path, megabytes: int) -> None:
    """A line of so many megabytes between two good ones, as it is made."""
    (tmp_path / "first.jsonl").write_bytes(GOOD)
    command = [sys.executable, "-c", STDIN, str(tmp_path / "first.jsonl"), str(ws.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b'{"text": "what is it", "label": "a"}\n')
        for _ in range(megabytes):
            process.stdin.write(b"x" * (1 << 20))
        process.stdin.write(b'\n{"text": "who is it", "label": "a"}\n')
        process.stdin.close()
        said = process.stdout.read().decode()
    assert process.returncode == 0
    assert "3 rows: 2 accepted (0 held out), 0 duplicates, 1 quarantined" in said
    assert "<stdin>, line 2: the line has more than 16,777,216 characters" in said
    assert int(said.splitlines()[-1]) < 300


def test_a_long_line_on_standard_input(ws: Workspace, tmp_path: Path) -> None:
    from_stdin(ws, tmp_path, 40)


@pytest.mark.soak
def test_ten_gigabytes_in_a_line_on_standard_input(ws: Workspace, tmp_path: Path) -> None:
    from_stdin(ws, tmp_path, 10_240)


@pytest.mark.soak
def test_ten_gigabytes_in_a_packed_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(bomb(10 << 30, b"x"))
    told, megabytes = reading(tmp_path / "a.jsonl.gz")
    assert told == ["1 too-large"] and megabytes < 300


def test_ten_gigabytes_of_nothing(tmp_path: Path) -> None:
    """A file with a hole: the first piece says what it is."""
    for name in ("a.jsonl", "a.csv", "a.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10 << 30)
        (found,) = read(tmp_path / name)
        assert isinstance(found, Bad) and found.rule == "binary-file"
    with (tmp_path / "a.parquet").open("wb") as file:
        file.truncate(10 << 30)
    told, megabytes = reading(tmp_path / "a.parquet")
    assert told == ["0 unreadable"] and megabytes < 300


def write_table(table: pa.Table, file: Path) -> None:
    if file.suffix == ".parquet":
        pq.write_table(table, file, dictionary_pagesize_limit=1 << 28)
    else:
        with pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)


def shared(places: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * places, pa.int32()), pa.array(["x" * 1_500_000]))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_long_text_that_many_rows_share(tmp_path: Path, name: str, nested: bool) -> None:
    """It is in the file once; written out it would be 3 GB."""
    table = pa.table({"question": shared(2048), "answer": ["a"] * 2048})
    if nested:
        turn = [pa.array(["user", "assistant"] * 1024), shared(2048)]
        turns = pa.StructArray.from_arrays(turn, ["role", "content"])
        table = pa.table({"messages": pa.ListArray.from_arrays(pa.array(range(0, 2049, 2), pa.int32()), turns)})
    write_table(table, tmp_path / name)
    told, megabytes = reading(tmp_path / name)
    assert told == [f"{row} ok" for row in range(1, table.num_rows + 1)] and megabytes < 400


def test_lists_that_many_rows_share(tmp_path: Path) -> None:
    """A list view may name the same elements as another."""
    turns = pa.StructArray.from_arrays(
        [pa.array(["user", "assistant"]), pa.array(["x" * 1_500_000, "a"])], ["role", "content"]
    )
    views = pa.ListViewArray.from_arrays([0] * 1024, [2] * 1024, turns)
    write_table(pa.table({"messages": views}), tmp_path / "a.arrow")
    told, megabytes = reading(tmp_path / "a.arrow")
    assert told == [f"{row} ok" for row in range(1, 1025)] and megabytes < 400


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_in_which_a_long_text_stands_often(tmp_path: Path, name: str) -> None:
    asked = pa.ListArray.from_arrays(pa.array([0, 1, 2048], pa.int32()), shared(2048))
    write_table(pa.table({"history": asked, "text": ["a", "b"], "label": ["c", "d"]}), tmp_path / name)
    told, megabytes = reading(tmp_path / name)
    assert told == ["1 ok", "2 too-large"] and megabytes < 300


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}"), ('[{"messages":', "}]")])
def test_json_nested_without_end(tmp_path: Path, name: str, open_: str, close: str) -> None:
    deep = open_ * 100_000 + "1" + close * 100_000
    (tmp_path / name).write_text(deep)
    told, megabytes = reading(tmp_path / name)
    assert told == [f"{int(name == 'a.jsonl')} bad-json"] and megabytes < 100
    (tmp_path / name).write_text(deep[:-1])
    assert all(isinstance(found, Bad) for found in read(tmp_path / name))
    rows = f'{GOOD.decode()}{{"text": {deep}, "label": "a"}}\n{GOOD.decode()}'
    (tmp_path / "rows.jsonl").write_text(rows)
    first, bad, last = read(tmp_path / "rows.jsonl")
    assert isinstance(bad, Bad) and "nested too deep" in bad.reason
    assert isinstance(first, Row) and isinstance(last, Row)


def test_descriptions_nested_without_end(ws: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    for name in ("dataset_info.json", "state.json", "dataset_dict.json"):
        (folder / name).write_text("[" * 100_000)
    found = ws.ingest(folder, task="t")
    assert (found.accepted, found.reasons) == (4, {"bad-json": 3})


def test_rows_without_end_are_refused_at_once(ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule is asked, for some take the square of a text's length; and few of them are in memory at a time."""
    long, piled = "x " * 1_500_000, "a" + "\u0315\u0300" * 30_000
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(4):
            file.write(json.dumps({"text": f"{number} {long}", "label": "a"}) + "\n")
        file.write(json.dumps({"text": piled, "label": piled}) + "\n" + GOOD.decode())
    found = ws.ingest(tmp_path / "a.jsonl", task="t")
    assert (found.rows, found.accepted, found.reasons) == (6, 1, {"too-long": 4, "encoding": 1})
    assert "3,000,002 characters are far more than cutoff_len=2048 tokens; split the row" in str(found.refused)
    assert "text has a character with more than 500 combining marks" in str(found.refused)
    monkeypatch.setattr(check, "PART_CHARACTERS", 8_000_000)
    row = Row("a", 1, Example.of([{"role": "user", "content": long}, {"role": "assistant", "content": "a"}]))
    parts = check.fit([row] * 7, check.opened(ws.config(), ws.root), "t")
    assert [len(part) for part in parts] == [3, 3, 1]


def test_a_long_row_is_still_cut_where_that_is_wanted(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(checks={"too-long": "repair", **{name: "off" for name in RULES if "off" in RULES[name].levels}})
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "q" * 300_000, "label": "a"}))
    assert ws.ingest(tmp_path / "a.jsonl", task="t").mended == {"too-long": 1}


# Paths that lead astray


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"file_name": "../../../../../../../../etc/passwd"}, "etc/passwd' leads out of"),
        ({"file_name": "/etc/passwd"}, "'/etc/passwd' leads out of"),
        ({"file_name": "out.json"}, "'out.json' leads out of"),
        ({"file_name": "loop.json"}, "'loop.json' is not in"),
        ({"file_name": "pipe.json"}, "'pipe.json' is not in"),
        ({"file_name": "a\0b"}, r"'a\\x00b' is not in"),
        ({"file_name": "\ud800"}, r"'\\ud800' is not in"),
        ({"file_name": "a" * 5000}, "aaa' is not in"),
        ({"file_name": ["good.json"]}, r"['good.json'] is not in"),
    ],
)
def test_lists_that_lead_astray(ws: Workspace, tmp_path: Path, entry: dict[str, Any], words: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.json").write_text('[{"instruction": "secret", "output": "secret"}]')
    (folder / "out.json").symlink_to(tmp_path / "outside.json")
    (folder / "loop.json").symlink_to("loop.json")
    os.mkfifo(folder / "pipe.json")
    (folder / "good.json").write_text('[{"instruction": "q", "output": "a"}]')
    (folder / "dataset_info.json").write_text(json.dumps({"x\n\ud800": entry}))
    found = ws.ingest(folder, task="t")
    assert (found.rows, found.accepted) == (1, 1)
    (notice,) = [notice for notice in found.notices if "dataset_info.json" in notice]
    assert words.replace("\\\\", "\\") in notice and notice.encode()
    (folder / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "good.json", "formatting": ["alpaca"]}}))
    with pytest.raises(UsageError, match=r"formatting \['alpaca'\]; known are"):
        ws.ingest(folder, task="t")


def test_data_sets_whose_titles_are_no_names(ws: Workspace, tmp_path: Path) -> None:
    """The second that names a file has its title in the name that is kept with each row."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.json").write_text('[{"instruction": "q", "output": "a"}]')
    listed = {title: {"file_name": "a.json"} for title in ("../x", "y\n\ud800")}
    (folder / "dataset_info.json").write_text(json.dumps(listed))
    found = ws.ingest(folder / "dataset_info.json")
    assert (found.accepted, found.duplicates, found.tasks) == (1, 1, {"../x": 1})


def test_links_and_what_is_no_file_are_told_and_left_out(ws: Workspace, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.jsonl").write_bytes(LINES)
    inbox = ws.inbox / "pens"
    inbox.mkdir()
    (inbox / "good.jsonl").write_bytes(GOOD)
    (inbox / "out.jsonl").symlink_to(tmp_path / "outside" / "a.jsonl")
    (inbox / "folder").symlink_to(tmp_path / "outside")
    (inbox / "self.jsonl").symlink_to("self.jsonl")
    (inbox / "here").symlink_to(inbox)
    (inbox / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "dataset_info.json", "state.json", "dataset_dict.json"):
        os.mkfifo(inbox / name)
    (inbox / "endless").mkdir()
    (inbox / "endless" / "dataset_info.json").symlink_to("/dev/zero")
    (inbox / "endless" / "state.json").symlink_to("/dev/zero")
    (inbox / "endless" / "a.arrow").write_bytes(b"")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(inbox / "s.csv"))
        found = ws.ingest()
    assert (found.rows, found.accepted, found.reasons) == (2, 1, {"empty-file": 1})
    left_out = [notice.partition(": it was left out: ") for notice in found.notices]
    told = {str(Path(file).relative_to(inbox)): why for file, _, why in left_out}
    out, pipe = "it is a link that leads out of the folder", "it is a pipe, a socket or a device"
    assert {name: why.split(";")[0] for name, why in told.items()} == {
        **dict.fromkeys(["out.jsonl", "folder", "zero.jsonl", "endless/dataset_info.json", "endless/state.json"], out),
        **dict.fromkeys(["pipe.jsonl", "s.csv", "dataset_info.json", "state.json", "dataset_dict.json"], pipe),
        "self.jsonl": "it is a link that leads nowhere, or may not be seen",
    }
    assert ws.ingest().rows == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loop.jsonl", r"loop\.jsonl does not exist"),
        ("pipe.jsonl", r"pipe\.jsonl is no file \(a pipe, a device\)"),
        ("a\0b.jsonl", r"a\\x00b\.jsonl does not exist"),
        ("a" * 5000, "aaa does not exist"),
        ("\ud800.jsonl", r"\\ud800\.jsonl does not exist"),
    ],
    ids=["loop", "pipe", "nul", "long", "surrogate"],
)
def test_names_of_nothing(ws: Workspace, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for source, held_out in ((tmp_path / name, None), (None, tmp_path / name)):
        with pytest.raises(UsageError, match=words):
            ws.ingest(source, held_out=held_out, task="t")
    assert not any(ws.catalog.counts().values())


def test_hidden_lists_are_not_read(ws: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "data" / ".git"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"x": {"file_name": "a.jsonl"}}')
    (folder / "a.jsonl").write_bytes(LINES)
    assert ws.ingest(folder.parent, task="t").rows == 0


def test_a_table_is_spare_only_where_all_that_are_named_are_there(ws: Workspace, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(toy_rows("pens", 4)).save_to_disk(str(tmp_path / "pens"))
    (shard,) = (tmp_path / "pens").glob("*.arrow")
    shard.rename(shard.with_name("renamed.arrow"))
    assert ws.ingest(tmp_path / "pens").accepted == 4


def test_names_with_line_ends(ws: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed has a line for each thing that is said; a task is called by one line."""
    folder = ws.inbox / "a\n9 rows: 9 accepted\x1b[2J"
    folder.mkdir()
    (folder / "b\nc.jsonl").write_bytes(GOOD + b"{}\n")
    assert run(["ingest", "-w", str(ws.root)]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith(("9", "c"))] == [] and "\x1b" not in said
    assert r"a\x0a9 rows: 9 accepted\x1b[2J: 1" in said and r"b\x0ac.jsonl, line 2: " in said
    assert ws.ingest(toy_rows("pens", 2), task="..\n\0\ud800").tasks == {r"..\x0a\x00\ud800": 2}
    with pytest.raises(UsageError, match="the name of the task"):
        ws.ingest(toy_rows("pens", 2), task="")


def test_rows_from_python_that_cannot_be_shown(ws: Workspace) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    found = ws.ingest([deep, {"text": deep, "label": "a"}, {"text": 10**5000, "label": "a"}, {"\ud800": 1}], task="t")
    assert found.reasons == {"not-an-object": 1, "bad-turns": 2, "unknown-format": 1}


# Formulas

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(1)", '=HYPERLINK("http://x?"&A1,"y")', "=1+1"]


def test_formulas_are_texts(ws: Workspace, tmp_path: Path) -> None:
    """They come in and go out as they were written; nothing that is written is a table for a spreadsheet."""
    import csv

    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"{formula} row {number}", formula] for number, formula in enumerate(FORMULAS))
        writer.writerow(["=1+2", ""])
    found = ws.ingest(tmp_path / "a.csv", task="t")
    assert (found.accepted, found.reasons) == (len(FORMULAS), {"no-answer": 1})
    (ids,) = ws.catalog.waiting(()).values()
    assert [ws.catalog.examples([id])[id].answer for id in ids] == FORMULAS
    assert quarantine.export(ws, tmp_path / "refused.jsonl") == 1
    assert json.loads((tmp_path / "refused.jsonl").read_text())["raw"].strip() == "=1+2,"
    for format, ending in (("alpaca", "json"), ("parquet", "parquet")):
        out = tmp_path / f"out.{ending}"
        assert run(["data", "export", "--format", format, "--out", str(out), "-w", str(ws.root)]) == 0
        assert [item.example.answer for item in read(out) if isinstance(item, Row)] == FORMULAS
    assert run(["data", "export", "--format", "alpaca", "--out", str(tmp_path / "a.csv"), "-w", str(ws.root)]) == 3
