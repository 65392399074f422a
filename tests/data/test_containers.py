"""Packed files, Arrow, folders of `datasets`, Chinese encodings: made by the real libraries, and damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering.data.containers import objects, packed, text
from treering.data.read import Bad, Row, find_files, read

ROWS = [{"text": f"question {number}", "label": "yes"} for number in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = pa.Table.from_pylist(ROWS)

datasets.disable_progress_bars()


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def arrow(table: pa.Table, stream: bool = False) -> bytes:
    sink = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def feather(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table, sink, compression="zstd")
    return sink.getvalue()


def outcome(file: Path, content: bytes) -> list[tuple[int, str]]:
    file.write_bytes(content)
    return [(item.line, item.rule if isinstance(item, Bad) else "ok") for item in read(file)]


def noted(file: Path, content: bytes) -> tuple[list[Row | Bad], list[str]]:
    notes: list[str] = []
    file.write_bytes(content)
    return list(read(file, note=notes.append)), notes


def bad(file: Path, content: bytes) -> Bad:
    file.write_bytes(content)
    (found,) = read(file)
    assert isinstance(found, Bad)
    return found


# Packed


CSV = b"text,label\n" + b"".join(f"question {number},yes\n".encode() for number in range(5))


@pytest.mark.parametrize("ending", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("a.jsonl", LINES, 1),
        ("a.json", json.dumps(ROWS).encode(), 1),
        ("a.csv", CSV, 2),
        ("a.tsv", CSV.replace(b",", b"\t"), 2),
        ("a.jsonl", LINES.decode().encode("utf-16"), 1),
    ],
)
def test_packed_text(tmp_path: Path, ending: str, name: str, content: bytes, first: int) -> None:
    pack: Callable[[bytes], bytes] = zstd if ending == ".zst" else gzip.compress
    found = outcome(tmp_path / (name + ending), pack(content))
    assert found == [(number, "ok") for number in range(first, first + 5)]


def test_packed_in_several_parts(tmp_path: Path) -> None:
    assert len(outcome(tmp_path / "a.jsonl.gz", gzip.compress(LINES) + gzip.compress(LINES))) == 10
    assert len(outcome(tmp_path / "a.jsonl.zst", zstd(LINES) + zstd(LINES))) == 10


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_packed_files_that_are_damaged(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    file = tmp_path / ("a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst")
    whole = pack(LINES)
    assert outcome(file, whole[:-3]) == [(0, "unreadable")]  # All of it is tried before a row is taken.
    assert "pack the file again" in bad(file, whole[:-3]).reason
    assert outcome(file, b"not packed at all") == [(0, "unreadable")]
    assert outcome(file, b"") == [(0, "empty-file")]
    assert outcome(file, pack(b"")) == [(0, "empty-file")]


def test_packed_tables_are_refused_with_the_way_out(tmp_path: Path) -> None:
    assert "'.parquet.gz' is not known" in bad(tmp_path / "a.parquet.gz", gzip.compress(b"")).reason or (
        "unpack the file" in bad(tmp_path / "a.parquet.gz", gzip.compress(b"x")).reason
    )
    assert "'.doc.gz' is not known" in bad(tmp_path / "a.doc.gz", gzip.compress(b"x")).reason
    assert "'.gz' is not known" in bad(tmp_path / "a.gz", gzip.compress(b"x")).reason


def test_what_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_UNPACKED", len(LINES) - 1)
    assert outcome(tmp_path / "a.jsonl.gz", gzip.compress(LINES)) == [(0, "too-large")]
    monkeypatch.setattr(packed, "MOST_UNPACKED", len(LINES))
    assert len(outcome(tmp_path / "a.jsonl.gz", gzip.compress(LINES))) == 5


BOMB = """
import resource, sys
from pathlib import Path
import pyarrow
from treering.data.read import read

file = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
for found in read(file):
    print(found.line, found.rule)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def bomb(size: int, byte: bytes) -> bytes:
    """A gzip file of so many bytes, all alike."""
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(pack.compress(byte * (1 << 20)) for _ in range(size >> 20)) + pack.flush()


@pytest.mark.parametrize(
    ("name", "byte", "said"),
    [
        pytest.param("zeros.jsonl.gz", b"\0", "0 binary-file", marks=pytest.mark.soak),
        ("line.jsonl.gz", b"x", "1 too-large"),
        pytest.param("cell.csv.gz", b"x", "0 bad-csv", marks=pytest.mark.soak),
    ],
)
def test_a_zip_bomb_of_a_gigabyte_takes_little_memory(tmp_path: Path, name: str, byte: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(bomb(1 << 30, byte))
    assert file.stat().st_size < 2 << 20
    program = [sys.executable, "-c", BOMB, str(file), str(3 << 30)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    *told, megabytes = done.stdout.splitlines()
    assert told == [said]
    assert int(megabytes) < 300


# Lines and lists without end


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits as they are met, but small."""
    for module in (text, objects):
        monkeypatch.setattr(module, "LONGEST_LINE", 100)
    monkeypatch.setattr("treering.data.containers.tables.LONGEST_LINE", 100)
    monkeypatch.setattr(objects, "LONGEST_LIST", 200)
    monkeypatch.setattr(objects, "LONGEST_JSON", 200)
    monkeypatch.setattr(objects, "_PIECE", 16)


def test_a_line_without_end_costs_itself_alone(short: None, tmp_path: Path) -> None:
    long = json.dumps({"text": "q" * 250, "label": "a"}).encode() + b"\n"
    assert outcome(tmp_path / "a.jsonl", LINES + long + LINES) == [
        *((number, "ok") for number in range(1, 6)),
        (6, "too-large"),
        *((number, "ok") for number in range(7, 12)),
    ]
    assert outcome(tmp_path / "a.jsonl", long[:-1]) == [(1, "too-large")]
    rows = CSV + b"q" * 250 + b",a\n" + b"q,a\n"
    assert outcome(tmp_path / "a.csv", rows)[5:] == [(7, "bad-csv"), (8, "ok")]


def test_a_long_list_is_read_element_by_element(short: None, tmp_path: Path) -> None:
    many = [{"text": f"question {number}", "label": "yes"} for number in range(100)]
    for indent in (None, 1):
        found = outcome(tmp_path / "a.json", json.dumps(many, indent=indent).encode())
        assert found == [(number, "ok") for number in range(1, 101)]
    whole = json.dumps(many).encode()
    assert outcome(tmp_path / "a.json", whole[:-30])[-2:] == [(99, "ok"), (0, "bad-json")]
    assert outcome(tmp_path / "a.json", whole + b"[]")[-2:] == [(100, "ok"), (0, "bad-json")]
    assert outcome(tmp_path / "a.json", whole[:-1] + b', 5, {"text": NaN}]')[-2:] == [
        (101, "not-an-object"),
        (102, "bad-json"),
    ]
    assert outcome(tmp_path / "a.json", whole.replace(b"}, {", b"} {", 1)) == [(1, "ok"), (0, "bad-json")]
    wrapped = b'{"data": ' + whole + b"}"
    assert outcome(tmp_path / "a.json", wrapped) == [(0, "too-large")]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.integers() | st.none()), min_size=1),
    indent=st.none() | st.integers(0, 2),
)
def test_a_list_reads_the_same_in_pieces(tmp_path: Path, rows: list[dict[str, object]], indent: int | None) -> None:
    content = json.dumps(rows, indent=indent).encode()
    whole = [(item.line, type(item)) for item in _read(tmp_path, content)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "LONGEST_LIST", 1)
        patch.setattr(objects, "_PIECE", 7)
        assert [(item.line, type(item)) for item in _read(tmp_path, content)] == whole


def _read(folder: Path, content: bytes) -> list[Row | Bad]:
    (folder / "a.json").write_bytes(content)
    return list(read(folder / "a.json"))


# Arrow


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.arrow", arrow(TABLE)), ("a.arrow", arrow(TABLE, stream=True)), ("a.feather", feather(TABLE))],
)
def test_arrow(tmp_path: Path, name: str, content: bytes) -> None:
    assert outcome(tmp_path / name, content) == [(number, "ok") for number in range(1, 6)]


def test_arrow_of_many_batches_and_other_columns(tmp_path: Path) -> None:
    table = pa.concat_tables([TABLE.append_column("picture", pa.array([b"\xff"] * 5))] * 500)
    for stream in (False, True):
        assert len(outcome(tmp_path / "a.arrow", arrow(table, stream))) == 2500


@pytest.mark.parametrize("content", [b"ARROW1", b"\xff\xff\xff\xff\x10\0\0\0", b"x", b"FEA1" + bytes(100)])
def test_arrow_that_is_none(tmp_path: Path, content: bytes) -> None:
    found = bad(tmp_path / "a.arrow", content)
    assert found.rule == "unreadable" and "write the file again" in found.reason


def test_arrow_that_says_it_goes_on_without_end(tmp_path: Path) -> None:
    sink = io.BytesIO()
    table = pa.table({"question": ["a", "b"], "answer": ["c", "d"]})
    with pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    content = sink.getvalue()
    length = len(pa.ipc.open_stream(content).read_next_batch().serialize())
    for at in range(len(content) - 8):  # The length of the batch's body is one of the numbers in its header.
        if 0 < int.from_bytes(content[at : at + 8], "little") < length and at % 8 == 0:
            damaged = content[:at] + (1 << 50).to_bytes(8, "little") + content[at + 8 :]
            (tmp_path / "a.arrow").write_bytes(damaged)
            assert list(read(tmp_path / "a.arrow"))


def test_arrow_whose_packed_texts_say_they_are_without_end(tmp_path: Path) -> None:
    table = pa.table({"question": ["what is it? " * 50] * 20, "answer": ["c"] * 20})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
        out.write_table(table)
    content = (tmp_path / "a.arrow").read_bytes()
    long = len(pa.array(table["question"].to_pylist()).buffers()[2]).to_bytes(8, "little")
    assert content.count(long) == 1  # Before the packed bytes stands how many they are.
    (tmp_path / "a.arrow").write_bytes(content.replace(long, (1 << 60).to_bytes(8, "little")))
    [bad] = read(tmp_path / "a.arrow")
    assert isinstance(bad, Bad) and f"cannot be read after row 0: malloc of size {1 << 60} failed" in bad.reason


def test_arrow_that_lies_about_its_texts(tmp_path: Path) -> None:
    """Offsets that lead out of the data would be read out of bounds."""
    content = bytearray(arrow(pa.table({"text": ["q" * 100] * 4, "label": ["a"] * 4})))
    place = content.index((100).to_bytes(4, "little") + (200).to_bytes(4, "little"))
    content[place : place + 4] = (1 << 30).to_bytes(4, "little")
    assert outcome(tmp_path / "a.arrow", bytes(content)) == [(0, "unreadable")]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["file", "stream", "gz", "zst"]))
def test_damage_never_raises(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    name, whole = {
        "file": ("a.arrow", arrow(TABLE)),
        "stream": ("b.arrow", arrow(TABLE, stream=True)),
        "gz": ("a.jsonl.gz", gzip.compress(LINES)),
        "zst": ("a.jsonl.zst", zstd(LINES)),
    }[kind]
    content = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    assert outcome(tmp_path / name, bytes(content))


def test_labels_that_are_numbers_get_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "very_positive"])}
    )
    made = datasets.Dataset.from_dict({"text": ["q", "r", "s"], "label": [1, 0, -1]}, features=features)
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    (shard,) = find_files(tmp_path / "saved")
    for file in (tmp_path / "a.parquet", shard):
        answers = [item.example.answer for item in read(file) if isinstance(item, Row)]
        assert answers == ["very positive", "negative", "-1"]


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}'])
def test_odd_metadata_is_passed_over(tmp_path: Path, metadata: bytes) -> None:
    pq.write_table(TABLE.replace_schema_metadata({b"huggingface": metadata}), tmp_path / "a.parquet")
    assert len(list(read(tmp_path / "a.parquet"))) == 5


# Encodings


CHINESE = "问题,答案\n我的订单什么时候到？,一般三天就到了。\n可以退款吗,可以的\n"


@pytest.mark.parametrize("encoding", ["gbk", "gb18030"])
def test_gbk_is_read_with_a_notice(tmp_path: Path, encoding: str) -> None:
    found, notes = noted(tmp_path / "a.csv", CHINESE.encode(encoding))
    assert [item.example.answer for item in found if isinstance(item, Row)] == ["一般三天就到了。", "可以的"]
    assert notes == ["it is not UTF-8 and was read as GB18030 (GBK), the usual encoding of Chinese files"]
    found, notes = noted(tmp_path / "a.jsonl.gz", gzip.compress('{"文本": "你好吗", "标签": "问候"}'.encode(encoding)))
    assert len(found) == 1 and isinstance(found[0], Row) and len(notes) == 1


@pytest.mark.parametrize(
    ("words", "encoding"),
    [
        ("Müller möchte größere Häuser, schöne Straßen und süße Äpfel für die Küche.", "latin-1"),
        ("L'été dernier, nous étions très préoccupés par la créée du château; où êtes-vous né?", "cp1252"),
        ("내일 주문한 상품이 언제 도착하는지 알고 싶습니다. 감사합니다.", "euc-kr"),
        ("注文した商品はいつ届きますか。教えてください。", "shift-jis"),
        ("注文した商品はいつ届きますか。教えてください。", "euc-jp"),
        ("請問我的訂單什麼時候會到？謝謝您的幫忙。", "big5"),
        ("Когда придёт мой заказ? Спасибо за помощь.", "cp1251"),
        ("Πότε θα έρθει η παραγγελία μου; Ευχαριστώ.", "iso8859-7"),
    ],
)
def test_other_encodings_are_not_taken_for_chinese(tmp_path: Path, words: str, encoding: str) -> None:
    content = f"text,label\n{words.replace(',', '')},yes\n".encode(encoding)
    assert outcome(tmp_path / "a.csv", content) == [(0, "encoding")]


def test_chinese_that_breaks_off_is_no_gbk(tmp_path: Path) -> None:
    whole = CHINESE.strip().encode("gbk")
    assert outcome(tmp_path / "a.csv", whole[:-1]) == [(0, "encoding")]
    assert outcome(tmp_path / "a.csv", whole + b"\0") == [(0, "binary-file")]


def test_pairs_are_noted(tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"
    found, notes = noted(tmp_path / "a.jsonl", LINES + pair.encode() * 2)
    assert len(found) == 7
    assert notes == ["2 preference pairs: the chosen answers are learned, the rejected ones are not kept"]


@pytest.mark.parametrize("indent", [1, 4])
def test_rows_that_are_laid_out_over_lines_are_told_so(tmp_path: Path, indent: int) -> None:
    """Each once, and the others are read."""
    good, file = json.dumps(ROWS[0]), tmp_path / "rows.jsonl"
    spread = json.dumps({"messages": [{"role": "user", "content": "a"}], "n": [1]}, indent=indent)
    last = len(spread.splitlines())
    file.write_text("\n".join([spread, good, spread, '{"text": "cut', "junk", good, '{"a": 1,', ""]))
    found = list(read(file))
    assert [row.line for row in found] == [
        1,
        last + 1,
        last + 2,
        2 * last + 2,
        2 * last + 3,
        2 * last + 4,
        2 * last + 5,
    ]
    assert [isinstance(row, Row) for row in found] == [False, True, False, False, False, True, False]
    reasons = [row.reason for row in found if isinstance(row, Bad)]
    assert f"this row is laid out over lines 1 to {last}, but in JSON Lines each has one" in reasons[0]
    assert not any("laid out" in reason for reason in reasons[2:])
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0], indent=indent))
    [bad] = read(tmp_path / "one.jsonl")
    assert isinstance(bad, Bad) and "name a file that is one list or object .json" in bad.reason
    (tmp_path / "one.jsonl").rename(tmp_path / "one.json")
    assert [type(row) for row in read(tmp_path / "one.json")] == [Row]


@pytest.mark.parametrize("encoding", [None, "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
@pytest.mark.parametrize("nested", [True, False])
def test_parquet_of_several_row_groups(tmp_path: Path, encoding: str | None, nested: bool) -> None:
    """Larger than what is decoded at once, and written in each of the ways that there are."""
    rows: list[dict[str, Any]] = [{"question": f"what of {n % 700}?", "answer": f"it is {n}"} for n in range(3000)]
    if nested:
        texts = [(row["question"], row["answer"]) for row in rows]
        roles = ("user", "assistant")
        rows = [{"messages": [{"role": r, "content": t} for r, t in zip(roles, pair, strict=True)]} for pair in texts]
    how: dict[str, Any] = {"use_dictionary": encoding is None}
    if encoding is not None:
        names = ("messages.list.element.role", "messages.list.element.content") if nested else ("question", "answer")
        how["column_encoding"] = dict.fromkeys(names, encoding)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1100, **how)
    found = list(read(tmp_path / "a.parquet"))
    assert [row.example.answer for row in found if isinstance(row, Row)] == [f"it is {n}" for n in range(3000)]
    assert isinstance(found[-1], Row) and found[-1].example.prompt[0].content == "what of 199?"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_table_with_turns_as_json_text(tmp_path: Path, delimiter: str) -> None:
    """As tables of conversations are exported."""
    turns = [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": 'c; "d" | e'}]
    file = tmp_path / "export.csv"
    with file.open("w", newline="") as stream:
        out = csv.writer(stream, delimiter=delimiter)
        out.writerows([["messages", "n"], [json.dumps(turns), 1], ["[1, 2", 2], ["hello", 3]])
    row, *bad = read(file)
    assert isinstance(row, Row) and row.example.as_dicts() == turns
    assert ["messages is text; it must be a list of turns" in str(one) for one in bad] == [True, True]


@pytest.mark.parametrize(("told", "delimiter"), [("sep=;", ";"), ('"SEP=|"', "|"), ("sep=\t", "\t"), ("sep=,", ",")])
@pytest.mark.parametrize("blank", ["", "\r\n"])
def test_a_table_that_tells_its_delimiter(tmp_path: Path, told: str, delimiter: str, blank: str) -> None:
    file = tmp_path / "excel.csv"
    table = [["text", "label"], ["a; b, c", "yes"], ["d", "no"]]
    lines = [told, *(delimiter.join(f'"{cell}"' for cell in cells) for cells in table), "e"]
    file.write_bytes(("\ufeff" + blank + "\r\n".join(lines)).encode())
    found = list(read(file))
    assert [row.line - len(blank) // 2 for row in found] == [3, 4, 5]
    assert [row.example.answer for row in found if isinstance(row, Row)] == ["yes", "no"]
