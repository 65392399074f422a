"""What `ingest` is given: folders of `datasets`, LLaMA-Factory's list, standard input, URLs, what is told of files."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from treering import Workspace
from treering.data.fetch import STDIN
from treering.data.read import find_files
from treering.data.sniff import suffix_of
from treering.errors import UsageError
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]

datasets.disable_progress_bars()

LINES = "".join(json.dumps(row) + "\n" for row in toy_rows("pens", 4)).encode()


def texts(ws: Workspace) -> dict[str, list[tuple[str, str]]]:
    """The turns of each row, by task."""
    found = {}
    for task, ids in ws.catalog.waiting(()).items():
        examples = ws.catalog.examples(ids)
        found[task] = [(turn.role, turn.content) for id in ids for turn in examples[id].messages]
    return found


@pytest.fixture
def ws(workspace: MakeWorkspace) -> Workspace:
    return workspace(val_size=0.0)


def saved(number: int, name: str = "pens") -> datasets.Dataset:
    return datasets.Dataset.from_list(toy_rows(name, number))


# Folders of `datasets`


def test_a_saved_dataset(ws: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "pens"
    saved(10).save_to_disk(str(folder), num_shards=3)
    assert len(list(folder.iterdir())) == 5
    assert [file.suffix for file in find_files(folder)] == [".arrow"] * 3
    (folder / "cache-0123.arrow").write_bytes(b"what map() left there")
    found = ws.ingest(folder)
    assert (found.rows, found.accepted, found.tasks) == (10, 10, {"pens": 10})
    assert ws.ingest(folder, task="pens").duplicates == 10


def test_a_saved_dataset_dict_keeps_its_splits(ws: Workspace, tmp_path: Path) -> None:
    made = datasets.DatasetDict({"train": saved(10), "test": saved(3, "cups"), "validation": saved(2, "hats")})
    made.save_to_disk(str(tmp_path / "shop"))
    found = ws.ingest(tmp_path / "shop")
    assert (found.rows, found.accepted, found.held_out, found.tasks) == (15, 15, 5, {"shop": 15})
    assert Workspace(ws.root).ingest(tmp_path / "shop" / "test").duplicates == 3


def test_saved_datasets_in_the_inbox(ws: Workspace) -> None:
    datasets.DatasetDict({"train": saved(10), "test": saved(3, "cups")}).save_to_disk(str(ws.inbox / "shop" / "june"))
    found = ws.ingest()
    assert (found.accepted, found.held_out, found.tasks) == (13, 3, {"shop": 13})
    assert ws.ingest().rows == 0


def test_names_of_descriptions_may_be_data(ws: Workspace, tmp_path: Path) -> None:
    for name in ("state.json", "dataset_info.json", "dataset_dict.json"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text(json.dumps([{"text": f"in {name}", "label": "x"}]))
    assert ws.ingest(tmp_path / "a").accepted == 3


def test_of_damaged_files_every_row_is_somewhere(ws: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    saved(40).save_to_disk(str(folder / "saved"), num_shards=2)
    shard = sorted((folder / "saved").glob("*.arrow"))[0]
    shard.write_bytes(shard.read_bytes()[:-600] + b"garbage" * 20)
    (folder / "good.jsonl.gz").write_bytes(gzip.compress(LINES + b'{"odd": 1}\n' + LINES))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(LINES)[:-9])
    (folder / "none.zst").write_bytes(b"x")
    (folder / "a.feather").write_bytes(b"ARROW1 but no more")
    found = ws.ingest(folder, task="t")
    assert found.rows == found.accepted + found.duplicates + found.quarantined
    assert (found.accepted, found.duplicates) == (24, 4)  # The other shard's, and the packed four, twice.
    assert found.reasons == {"unreadable": 3, "unknown-format": 2}


# LLaMA-Factory's list


ALPACA = [{"prompt_zh": "q", "query": "in", "reply": "a", "past": [["q1", "a1"]], "sys": "s", "system": "not mapped"}]
SHARED = [{"talk": [{"who": "U", "says": "q2"}, {"who": "B", "says": "a2"}], "rules": "s2"}]
RANKED = [
    {
        "conversations": [{"from": "human", "value": "q3"}],
        "chosen": {"from": "gpt", "value": "a3"},
        "rejected": {"from": "gpt", "value": "no"},
    }
]
LIST: dict[str, Any] = {
    "mapped": {
        "file_name": "alpaca.json",
        "columns": {"prompt": "prompt_zh", "query": "query", "response": "reply", "history": "past", "system": "sys"},
    },
    "shared": {
        "file_name": "shared.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "rules"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "B"},
    },
    "ranked": {
        "file_name": "ranked.json",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
    },
    "plain": {"file_name": "plain.json"},
    "marked": {
        "file_name": "kto.json",
        "columns": {"prompt": "instruction", "response": "output", "kto_tag": "ok", "images": "images"},
    },
    "prose": {"file_name": "prose.txt", "columns": {"prompt": "text"}},
    "texts": {"file_name": "texts.jsonl", "columns": {"prompt": "body"}},
    "far": {"hf_hub_url": "org/far", "ms_hub_url": "org/far"},
    "gone": {"file_name": "gone.json"},
    "outside": {"file_name": "../outside.json"},
}
FILES: dict[str, list[dict[str, Any]]] = {
    "alpaca.json": ALPACA,
    "shared.jsonl": SHARED,
    "ranked.json": RANKED,
    "pairs.json": [{"ask": "q4", "good": "a4", "bad": "no"}],
    "texts.jsonl": [{"body": "A text to go on with.", "label": "web"}],
    "plain.json": [{"instruction": "q5", "input": "", "output": "a5"}],
    "kto.json": [
        {"instruction": "q6", "output": "a6", "ok": True, "images": []},
        {"instruction": "q7", "output": "a7", "ok": False},
        {"instruction": "q8", "output": "a8", "ok": True, "images": ["a.png"]},
    ],
}
WANTED = {
    "mapped": [("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q\nin"), ("assistant", "a")],
    "shared": [("system", "s2"), ("user", "q2"), ("assistant", "a2")],
    "ranked": [("user", "q3"), ("assistant", "a3")],
    "pairs": [("user", "q4"), ("assistant", "a4")],
    "plain": [("user", "q5"), ("assistant", "a5")],
    "marked": [("user", "q6"), ("assistant", "a6")],
    "prose": [("text", "Some prose.")],
    "texts": [("text", "A text to go on with.")],
}


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in FILES.items():
        end = "\n" if name.endswith("l") else ""
        (folder / name).write_text("".join(map(json.dumps, rows)) + end if end else json.dumps(rows))
    (folder / "prose.txt").write_text("Some prose.")
    (folder / "dataset_info.json").write_text(json.dumps(LIST))
    (tmp_path / "outside.json").write_text("[]")
    return folder


@pytest.mark.parametrize("by", ["file", "folder"])
def test_a_llama_factory_list(ws: Workspace, factory: Path, by: str) -> None:
    found = ws.ingest(factory / "dataset_info.json" if by == "file" else factory)
    assert texts(ws) == WANTED
    assert found.reasons == {"undesired-answer": 1, "bad-turns": 1}
    notes = "\n".join(found.notices)
    for said in (
        "far was left out: its rows are elsewhere (hf_hub_url org/far)",
        "gone was left out: file_name 'gone.json' is not in",
        "outside was left out: file_name '../outside.json' leads out of",
        "ranked.json: 1 preference pairs",
        "pairs.json: 1 preference pairs",
    ):
        assert said in notes


def test_one_data_set_of_a_list(ws: Workspace, factory: Path) -> None:
    assert ws.ingest(factory, dataset="shared").tasks == {"shared": 1}
    assert ws.ingest(factory / "dataset_info.json", dataset="mapped", task="mine").tasks == {"mine": 1}
    with pytest.raises(UsageError, match=r"'none' is not in .*; it lists mapped, shared"):
        ws.ingest(factory, dataset="none")
    with pytest.raises(UsageError, match="--dataset far: its rows are elsewhere"):
        ws.ingest(factory, dataset="far")
    with pytest.raises(UsageError, match=r"is no dataset_info\.json of LLaMA-Factory"):
        ws.ingest(factory / "plain.json", dataset="plain")


def test_a_list_in_the_inbox(ws: Workspace, factory: Path) -> None:
    factory.rename(ws.inbox / "shop")
    found = ws.ingest()
    assert found.tasks == {"shop": len(WANTED)}
    assert sorted(texts(ws)["shop"]) == sorted(turn for turns in WANTED.values() for turn in turns)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"formatting": "odd"}, "formatting 'odd'; known are alpaca, sharegpt, openai"),
        ({"columns": ["a"]}, "columns of plain are"),
        ({"tags": {"role_tag": 5}}, "tags of plain are"),
    ],
)
def test_a_list_that_is_wrong(ws: Workspace, factory: Path, entry: dict[str, Any], words: str) -> None:
    (factory / "dataset_info.json").write_text(json.dumps({"plain": {"file_name": "plain.json", **entry}}))
    with pytest.raises(UsageError, match=words):
        ws.ingest(factory)


def test_a_list_of_nothing_here(ws: Workspace, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"far": LIST["far"]}))
    with pytest.raises(UsageError, match="lists 1 data sets, of which none is a file here"):
        ws.ingest(tmp_path / "dataset_info.json")


# Told


def test_columns_that_are_told(ws: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Frage,Antwort,system,text\nq,a,x,y\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"frage": "r", "antwort": "b"}\n{"other": 1}\n', encoding="utf-8")
    found = ws.ingest([tmp_path / "a.csv", tmp_path / "b.jsonl"], task="t", columns="question=frage, answer=antwort")
    assert texts(ws) == {"t": [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]}
    assert "'frage' was told, but the keys found are 'other'" in found.refused[0]["reason"]
    found = ws.ingest(tmp_path / "a.csv", task="t", columns={"question": "frage", "answer": "reply"})
    assert "'reply' was told, but the columns are 'Frage', 'Antwort'" in found.refused[0]["reason"]


def test_formats_that_are_told(ws: Workspace, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text('{"text": "q", "label": "a", "prompt": "r", "completion": "b"}\n')
    assert ws.ingest(tmp_path / "rows.txt", task="t").reasons == {"unknown-format": 1}
    assert ws.ingest(tmp_path / "rows.txt", task="t", format="jsonl,label").accepted == 1
    assert texts(ws) == {"t": [("user", "q"), ("assistant", "a")]}
    found = ws.ingest(tmp_path / "rows.txt", task="t", format="parquet")
    assert (found.rows, found.reasons) == (1, {"unreadable": 1})


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"format": "xml"}, "'xml' is not known, or one too many; it takes a container .jsonl, json, csv"),
        ({"format": "csv,tsv"}, "'tsv' is not known, or one too many"),
        ({"columns": "question"}, "is no list of pairs; write it as question=frage,answer=antwort"),
        ({"columns": "question=a,question=b"}, "names a key twice"),
        ({"columns": "frage=question"}, "'frage' is no key that a row may have"),
    ],
)
def test_what_is_told_wrongly(ws: Workspace, tmp_path: Path, told: dict[str, str], words: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UsageError, match=words):
        ws.ingest(tmp_path / "a.jsonl", task="t", **told)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="are for files that are named"):
        ws.ingest(format="csv")
    assert not any(ws.catalog.counts().values())


def test_gbk_is_told_to_who_ingests(ws: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("问题,答案\n我的订单什么时候到？,一般三天就到了。\n".encode("gbk"))
    found = ws.ingest(tmp_path / "a.csv", task="t")
    assert found.accepted == 1
    (notice,) = found.notices
    assert notice.startswith(f"{tmp_path / 'a.csv'}: it is not UTF-8 and was read as GB18030")


# Standard input


def given(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    ("content", "suffix"),
    [
        (LINES, ".jsonl"),
        (gzip.compress(LINES), ".jsonl.gz"),
        (json.dumps(toy_rows("pens", 4)).encode(), ".json"),
        (json.dumps({"data": toy_rows("pens", 4)}, indent=1).encode(), ".json"),
        (b"text,label\nq,a\nr,a\ns,a\nt,a\n", ".csv"),
        (b"text\tlabel\nq\ta\nr\ta\ns\ta\nt\ta\n", ".tsv"),
    ],
    ids=["jsonl", "gz", "list", "data", "csv", "tsv"],
)
def test_standard_input(
    ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, suffix: str
) -> None:
    (tmp_path / "x").write_bytes(content)
    assert suffix_of(tmp_path / "x") == suffix
    given(monkeypatch, content)
    assert ws.ingest("-", task="t").accepted == 4


def test_standard_input_in_tables_and_damaged(ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(4).to_parquet(str(tmp_path / "a.parquet"))
    given(monkeypatch, (tmp_path / "a.parquet").read_bytes())
    assert ws.ingest("-", task="t").accepted == 4
    for content in (b"", b"\x1f\x8bno", b"PAR1", b"odd"):
        given(monkeypatch, content)
        found = ws.ingest("-", task="t")
        assert (found.rows, found.quarantined, found.refused[0]["file"]) == (1, 1, STDIN)
    assert ws.catalog.counts()["quarantined"] == 4
    with pytest.raises(UsageError, match="need --task"):
        ws.ingest("-")


# URLs


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gopher://host/a.jsonl", r"gopher:// is not read, known are s3://, hf://; download the file"),
        ("https://host/a.jsonl", "https:// is not read"),
        ("s3://key:hush@bucket/a.jsonl", "credentials belong in the environment"),
        ("s3://bucket/a.jsonl?X-Amz-Signature=hush", "credentials belong in the environment"),
    ],
)
def test_urls_that_are_refused(ws: Workspace, url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        ws.ingest(url, task="t")
    assert "hush" not in str(caught.value)


def test_files_are_fetched_through_fsspec(ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file system of fsspec's will do; this one needs no server."""
    from fsspec.implementations.memory import MemoryFileSystem

    there = MemoryFileSystem()
    there.pipe("/june/pens/train.jsonl", LINES)
    there.pipe("/june/pens/notes.docx", b"PK")
    monkeypatch.setattr("treering.data.fetch._file_system", lambda scheme, bucket: there)
    found = ws.ingest("hf://june")
    assert (found.accepted, found.tasks) == (4, {"pens": 4})
    assert found.refused[0]["file"] == "hf://june/pens/notes.docx"
    assert ws.ingest("hf://june/pens/train.jsonl").duplicates == 4
    with pytest.raises(UsageError, match=r"hf://june/none\.jsonl does not exist"):
        ws.ingest("hf://june/none.jsonl")
