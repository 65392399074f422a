"""Files in: good rows out, and a named reason for everything else."""

from __future__ import annotations

import csv
import io
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treering.data.example import Example
from treering.data.read import DATA_SUFFIXES, Bad, Row, find_files, read, split_of
from treering.errors import UsageError

GOOD = '{"text": "q", "label": "a"}'


def read_content(name: str, content: str | bytes, need_answer: bool = True) -> list[Row | Bad]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read(file, need_answer=need_answer))


def outcome(name: str, content: str | bytes) -> list[tuple[int, str]]:
    return [(item.line, item.rule if isinstance(item, Bad) else "ok") for item in read_content(name, content)]


def only_bad(name: str, content: str | bytes) -> Bad:
    (item,) = read_content(name, content)
    assert isinstance(item, Bad)
    return item


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


# Containers


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", f"{GOOD}\n\n{GOOD}\n", [(1, "ok"), (3, "ok")]),
        ("a.NDJSON", f"{GOOD}\r\n{GOOD}", [(1, "ok"), (2, "ok")]),
        ("a.jsonl", f"[\n{GOOD},\n{GOOD}]", [(1, "ok"), (2, "ok")]),
        ("a.json", f"[{GOOD}, {GOOD}]", [(1, "ok"), (2, "ok")]),
        ("a.json", GOOD, [(1, "ok")]),
        ("a.json", f"{GOOD}\n{GOOD}\n", [(1, "ok"), (2, "ok")]),
        ("a.json", f'{{"x": \n{GOOD}\n{GOOD}', [(1, "truncated-json"), (2, "ok"), (3, "ok")]),
        ("a.json", f"{GOOD}\nnonsense\n", [(1, "ok"), (2, "bad-json")]),
        ("a.json", f'{{"version": 1, "data": [{GOOD}]}}', [(1, "ok")]),
        ("a.json", f'{{"Train": [{GOOD}], "columns": ["text", "label"]}}', [(1, "ok")]),
        ("a.json", f'{{"rows": [{GOOD}, 5]}}', [(1, "ok"), (2, "not-an-object")]),
        ("a.csv", "text,label\nq,a\n", [(2, "ok")]),
        ("a.csv", '\nText , LABEL,\n"q\nq",a,\n,,\nq,a,', [(3, "ok"), (6, "ok")]),
        ("a.csv", "text;label\r\nq;a\r\n", [(2, "ok")]),
        ("a.tsv", "text\tlabel\nq\ta\n", [(2, "ok")]),
        ("a.parquet", parquet(pa.table({"text": ["q", "q"], "label": [1, 2]})), [(1, "ok"), (2, "ok")]),
        ("a.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), [(1, "ok")]),
        ("a.csv", "text,label\nq,é\n".encode("utf-16"), [(2, "ok")]),
        ("a.json", GOOD.encode("utf-16-be").join([b"\xfe\xff", b""]), [(1, "ok")]),
    ],
)
def test_containers(name: str, content: str | bytes, expected: list[tuple[int, str]]) -> None:
    assert outcome(name, content) == expected


def test_parquet_messages_whose_turns_have_nulls() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": None}]
    (row,) = read_content("a.parquet", parquet(pa.Table.from_pylist([{"messages": turns, "extra": b"\xff"}])))
    assert isinstance(row, Row)
    assert row.example == Example.of([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])


def test_prediction_rows() -> None:
    (row,) = read_content("a.csv", "text\nq\n", need_answer=False)
    assert isinstance(row, Row)
    assert row.example.as_dicts() == [{"role": "user", "content": "q"}]


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f"{GOOD}\n" * 100_000)
    rows = read(file)
    assert [next(rows).line for _ in range(3)] == [1, 2, 3]


# Bad content


@pytest.mark.parametrize("name", [f"a{suffix}" for suffix in DATA_SUFFIXES])
def test_empty_files(name: str) -> None:
    assert outcome(name, b"") == [(0, "empty-file")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", " \n\n"),
        ("a.json", "\ufeff \n"),
        ("a.json", "[]"),
        ("a.json", '{"data": []}'),
        ("a.csv", "text,label\n"),
        ("a.csv", "\n , \n"),
        ("a.parquet", parquet(pa.table({"text": pa.array([], pa.string())}))),
    ],
)
def test_files_without_rows(name: str, content: str | bytes) -> None:
    assert outcome(name, content) == [(0, "empty-file")]


FILES: list[tuple[str, str | bytes, str, str]] = [
    ("a.doc", "q", "unknown-format", "'.doc' is not known; convert the file to one of .jsonl"),
    (
        "a.txt",
        '{"text": "q"}\n',
        "unknown-format",
        "it looks like JSON (.json, .jsonl); name it so, or tell",
    ),
    ("a", "q", "unknown-format", ".parquet"),
    ("a.jsonl", b"\x89PNG\0\0", "binary-file", "UTF-8"),
    ("a.csv", "text,label\nq\0,a", "binary-file", "NUL"),
    ("a.csv", "\0".encode("utf-16"), "binary-file", "NUL"),
    ("a.csv", "text,label\nq,é".encode("latin-1"), "encoding", "byte 13; convert it to UTF-8"),
    ("a.jsonl", b"x" * (1 << 20) + b"\xe2\x82", "encoding", f"byte {1 << 20}"),
    ("a.jsonl", b"\xff\xfea", "encoding", "UTF-16, as its first two bytes say, at byte 2"),
    ("a.json", f'[{GOOD}, {{"text": "q', "truncated-json", "column 40"),
    ("a.json", f"[{GOOD},\n {GOOD}", "truncated-json", "line 2"),
    ("a.json", f"[{GOOD},\n {GOOD}]]", "bad-json", "line 2 column 30"),
    ("a.json", "[" * 5000, "bad-json", "nested too deep"),
    ("a.json", f'{{"train": [{GOOD}], "test": [{GOOD}]}}', "unknown-format", "'train' and 'test' stand in one file"),
    ("a.csv", "q,a\nq,a\n", "unknown-format", "first line must name the columns, but the keys found are 'q', 'a'"),
    ("a.csv", "text,Text,label\nq,q,a\n", "unknown-format", "named 'text'"),
    ("a.csv", '"text,label\nq,a\n', "bad-csv", "unexpected end"),
    ("a.parquet", parquet(pa.table({"x": [1]})), "unknown-format", "'x'"),
    ("a.parquet", "not Parquet", "unreadable", "after row 0"),
    ("a.parquet", parquet(pa.table({"text": ["q"]}))[:-20], "unreadable", "write the file again"),
]


@pytest.mark.parametrize(("name", "content", "rule", "reason"), FILES, ids=lambda value: str(value)[:30])
def test_whole_files_are_refused(name: str, content: str | bytes, rule: str, reason: str) -> None:
    bad = only_bad(name, content)
    assert (bad.line, bad.rule) == (0, rule)
    assert reason in bad.reason


LINES = [
    ('{"text": "q", "label": "a"', "truncated-json", "column 27"),
    ('{"text": "q", "la', "truncated-json", "breaks off"),
    ('{"text": "q", "label": "\\u12', "truncated-json", "breaks off"),
    ('{"text": "q" "label": "a"}', "bad-json", "column 14"),
    ('{"text": "q", "label": NaN}', "bad-json", "NaN"),
    ('{"text": "q", "label": "a", "x": [[-Infinity]]}', "bad-json", "-Infinity"),
    ('{"text": "q", "label": ' + "9" * 5000 + "}", "bad-json", "5000 digits"),
    ('{"text": "q", "label": "a", "label": "b"}', "bad-json", "'label' stands twice"),
    ('{"x": ' * 5000, "bad-json", "nested too deep"),
    ('{"text": "q\\ud800", "label": "a"}', "encoding", "U+D800"),
    ("5", "not-an-object", "a number"),
    ("null", "not-an-object", "null"),
    ('{"q": "q"}', "unknown-format", "'q'"),
    ('{"text": "q"}', "no-answer", "label"),
    ('{"messages": []}', "no-user-turn", "user"),
    ('{"messages": [5]}', "bad-turns", "turn 1"),
]


@pytest.mark.parametrize(("line", "rule", "reason"), LINES, ids=lambda value: value[:30])
def test_a_bad_line_costs_itself_alone(line: str, rule: str, reason: str) -> None:
    first, bad, last = read_content("a.jsonl", f"{GOOD}\n{line}\n{GOOD}\n")
    assert isinstance(first, Row) and isinstance(last, Row) and isinstance(bad, Bad)
    assert (bad.line, bad.rule) == (2, rule)
    assert reason in bad.reason
    assert bad.raw and len(bad.raw) <= 2000
    assert bad.raw[:20] in line


@pytest.mark.parametrize("element", ["5", '{"text": NaN}', '{"text": "q", "text": "r"}', '{"text": "\\udc00"}', "null"])
def test_a_bad_element_costs_itself_alone(element: str) -> None:
    first, bad, last = read_content("a.json", f"[{GOOD}, {element}, {GOOD}]")
    assert isinstance(first, Row) and isinstance(last, Row) and isinstance(bad, Bad)
    assert bad.line == 2 and bad.raw.encode()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("q\nq,a\n", [(2, "bad-csv"), (3, "ok")]),
        ("q,a,b\nq,a\n", [(2, "bad-csv"), (3, "ok")]),
        ("q," + "x" * 140_000 + "\nq,a\n", [(2, "bad-csv"), (3, "ok")]),
        ('"q" q,a\nq,a\n', [(2, "bad-csv"), (3, "ok")]),
        ('"open,a\nq,a\nq,a\n', [(2, "bad-csv"), (3, "ok"), (4, "ok")]),
        ('"open,a\nq,a\n"q, q",a\n', [(2, "bad-csv"), (3, "ok"), (4, "ok")]),
        ('q,"open\n' + "q,a\n" * 50_000, [(2, "bad-csv"), *((line, "ok") for line in range(3, 50_003))]),
        ("q,\nq,a\n", [(2, "no-answer"), (3, "ok")]),
    ],
    ids=range(8),
)
def test_a_bad_csv_row_costs_itself_alone(rows: str, expected: list[tuple[int, str]]) -> None:
    assert outcome("a.csv", f"text,label\n{rows}") == expected


def test_a_table_of_quotes_that_never_close_does_not_take_for_ever() -> None:
    """Each line opens one: in time by the square of these lines it would be minutes."""
    found = outcome("a.csv", "text,label\nq,a\n" + 'a","\n' * 20_000)
    assert found[0] == (2, "ok") and found[-1] == (0, "bad-csv")
    assert 2 < len(found) < 50 and {rule for _, rule in found[1:]} == {"bad-csv"}
    few = outcome("a.csv", "text,label\n" + 'a","\n' * 50 + "q,a\n")
    assert len(few) == 51 and few[-1] == (52, "ok")


def test_an_undecodable_parquet_row_costs_itself_alone() -> None:
    texts = pa.array([b"q", b"\xff", b"q"]).view(pa.string())
    content = parquet(pa.table({"text": texts, "label": ["a", "b", "c"]}))
    assert outcome("a.parquet", content) == [(1, "ok"), (2, "unreadable"), (3, "ok")]


def test_texts_for_people_can_always_be_stored() -> None:
    bad = only_bad("caf\udce9.jsonl", '{"\\ud800\\u0000": 1}')
    assert bad.file.endswith("caf\\udce9.jsonl")
    assert "\0" not in bad.reason + bad.raw
    assert (bad.file + bad.reason + bad.raw).encode()


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)
    (bad,) = read(file)
    assert isinstance(bad, Bad)
    assert (bad.line, bad.rule) == (0, "unreadable")
    assert "Permission denied" in bad.reason


def test_no_such_file_is_a_usage_error_at_once(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UsageError, match="is not a file"):
            read(path)


# Folders and names


def test_find_files(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "outside.jsonl"
    for name in (
        "b.jsonl",
        "a/c.csv",
        "a.txt",
        ".hidden.csv",
        ".git/x.csv",
        "x.csv~",
        "x.part",
        "x.tmp",
        "x.crdownload",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    outside.write_text("x")
    (folder / "leaves.jsonl").symlink_to(outside)
    (folder / "broken.jsonl").symlink_to(folder / "none")
    (folder / "stays.jsonl").symlink_to(folder / "b.jsonl")
    (folder / "loop").symlink_to(folder)
    found = [str(file.relative_to(folder)) for file in find_files(folder)]
    assert found == ["a/c.csv", "a.txt", "b.jsonl", "stays.jsonl"]
    assert find_files(outside) == [outside]
    with pytest.raises(UsageError, match="does not exist"):
        find_files(tmp_path / "none")


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("held_out", "test.csv TEST.csv test-1.jsonl test_a.json test.a.csv held_out.csv held-out.csv heldout-1.csv"),
        ("val", "val.csv valid.csv validation-00000-of-00001.parquet dev.jsonl dev_2.tsv"),
        ("train", "train.csv data.csv testing.csv latest.csv my-test.csv value.csv device.csv heldouts.csv"),
    ],
)
def test_split_of(split: str, names: str) -> None:
    assert {split_of(Path("test", name)) for name in names.split()} == {split}


# Properties

Turn = dict[str, str]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
filled = texts.map(str.strip).filter(bool)
middle = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": filled})
pairs = st.tuples(filled, filled).map(
    lambda pair: [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
)
systems = st.lists(st.fixed_dictionaries({"role": st.just("system"), "content": filled}), max_size=1)
conversations = st.tuples(systems, st.lists(middle, max_size=3), pairs).map(lambda parts: [t for p in parts for t in p])


def as_jsonl(rows: Sequence[list[Turn]]) -> bytes:
    return "\n".join(json.dumps({"messages": row}, ensure_ascii=len(rows) % 2 == 0) for row in rows).encode()


def as_json(rows: Sequence[list[Turn]]) -> bytes:
    return json.dumps([{"messages": row} for row in rows], ensure_ascii=False, indent=len(rows) % 2 or None).encode()


def as_parquet(rows: Sequence[list[Turn]]) -> bytes:
    return parquet(pa.Table.from_pylist([{"messages": row} for row in rows]))


def as_csv(rows: Sequence[list[Turn]], delimiter: str = ",") -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter)
    writer.writerows([("prompt", "completion"), *((row[-2]["content"], row[-1]["content"]) for row in rows)])
    return sink.getvalue().encode()


def as_tsv(rows: Sequence[list[Turn]]) -> bytes:
    return as_csv(rows, "\t")


WRITERS: dict[str, Callable[[Sequence[list[Turn]]], bytes]] = {
    ".jsonl": as_jsonl,
    ".ndjson": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".tsv": as_tsv,
    ".parquet": as_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(conversations, min_size=1, max_size=4))
def test_what_is_written_reads_back(suffix: str, rows: list[list[Turn]]) -> None:
    wanted = [Example.of(row[-2:] if suffix in (".csv", ".tsv") else row).id for row in rows]
    items = read_content(f"a{suffix}", WRITERS[suffix](rows))
    assert [item.example.id if isinstance(item, Row) else item for item in items] == wanted


@pytest.mark.parametrize("suffix", DATA_SUFFIXES)
@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace")))
def test_arbitrary_bytes_never_raise(suffix: str, content: bytes) -> None:
    assert read_content(f"a{suffix}", content)


@pytest.mark.parametrize("suffix", WRITERS)
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(conversations, min_size=1, max_size=3), seed=st.integers(0, 2**32))
def test_damaged_files_never_raise(suffix: str, rows: list[list[Turn]], seed: int) -> None:
    content, chance = bytearray(WRITERS[suffix](rows)), random.Random(seed)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(content))
        content[place : place + chance.randint(0, 3)] = chance.choice(
            [b"", b'"', b"\n", b"{", b",", b"\\", b"\x00\xff"]
        )
        content = content or bytearray(b"{")
    assert read_content(f"a{suffix}", bytes(content))


keys = st.sampled_from(["messages", "role", "content", "from", "value", "text", "type", "label", "history"]) | st.text(
    max_size=3
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
records = st.dictionaries(
    st.sampled_from(
        ["messages", "conversations", "prompt", "completion", "instruction", "output", "history", "system"]
    ),
    json_values,
)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(records.map(json.dumps) | st.text(max_size=20).map(json.dumps) | texts, min_size=1, max_size=6))
def test_every_json_line_is_accounted_for(lines: list[str]) -> None:
    content = "{}\n" + "\n".join(lines)
    kept = io.StringIO(content, newline=None)
    wanted = [number for number, line in enumerate(kept, 1) if line.strip()]
    assert [item.line for item in read_content("a.jsonl", content)] == wanted


@settings(max_examples=150, deadline=None)
@given(record=records, length=st.floats(0, 1, exclude_max=True))
def test_a_cut_line_is_told_from_a_wrong_one(record: dict[str, object], length: float) -> None:
    whole = json.dumps(record)
    cut = whole[: max(1, int(len(whole) * length))]
    assert only_bad("a.jsonl", cut).rule == "truncated-json"
