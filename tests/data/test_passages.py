"""Plain text: recognised, cut into passages, learned whole, scored by its tokens, written out again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from treering import Workspace
from treering.data.containers.passages import MOST
from treering.data.export import export
from treering.data.read import Bad, Row, read
from treering.model import encode, load_tokenizer
from treering.results import RESULTS, read_results
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]


def passages(file: Path, text: str) -> list[tuple[int, str]]:
    file.write_text(text, encoding="utf-8")
    found = list(read(file, note=lambda _: None))
    assert all(isinstance(row, Row) and row.example.is_text for row in found)
    return [(row.line, row.example.answer) for row in found if isinstance(row, Row)]


def test_short_paragraphs_come_together(tmp_path: Path) -> None:
    assert passages(tmp_path / "a.txt", "one\nand more\n\n\n two \n") == [(1, "one\nand more\n\ntwo")]
    long, last = "A sentence of some words. " * 76, "last " * 9 + "of all"
    found = passages(tmp_path / "b.txt", f"\nfirst\n\n{long}\n\n{last}\n")
    assert [line for line, _ in found] == [2, 6]
    assert found[1][1] == last and found[0][1] == f"first\n\n{long.strip()}"


def test_long_ones_are_cut_behind_sentences_and_nothing_is_lost(tmp_path: Path) -> None:
    text = " ".join(f"This is sentence {number}." for number in range(1000))
    found = [passage for _, passage in passages(tmp_path / "a.txt", text)]
    assert " ".join(found) == text
    assert all(passage.endswith(".") and MOST / 2 < len(passage) <= MOST for passage in found[:-1])
    plain = "字" * (3 * MOST)
    assert "".join(passage for _, passage in passages(tmp_path / "b.txt", plain)) == plain
    lines = "\n".join(f"line {number}" for number in range(9000))
    assert "\n".join(passage for _, passage in passages(tmp_path / "c.txt", lines)).split() == lines.split()


def test_what_looks_like_rows_is_no_text(tmp_path: Path) -> None:
    for text, looks in (
        ('{"text": "q", "label": "a"}\n', "JSON"),
        ('[\n{"a": 1}]', "JSON"),
        ("Text,label\nq,a\n", "a table"),
    ):
        (tmp_path / "a.txt").write_text(text)
        [found] = read(tmp_path / "a.txt")
        assert isinstance(found, Bad) and f"it looks like {looks}" in found.reason


def test_the_first_row_of_a_file_tells(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "a.jsonl").write_text('{"text": "a page", "url": "x"}\n{"text": "more"}\n{"text": "q", "label": "a"}\n')
    one, two, bad = read(tmp_path / "a.jsonl", note=notes.append)
    assert isinstance(one, Row) and one.example.is_text and isinstance(two, Row)
    assert isinstance(bad, Bad) and "this row has a label" in bad.reason
    assert notes == [
        "these are no part of a row and were not read: 'url'; --columns says what else is (docs/data.md)",
        "2 plain texts: all of each is learned, as in pre-training; no row of the file has a label",
    ]
    (tmp_path / "b.jsonl").write_text('{"text": "q", "label": "a"}\n{"text": "no label"}\n')
    _, second = read(tmp_path / "b.jsonl")
    assert isinstance(second, Bad) and second.rule == "no-answer"
    (tmp_path / "c.csv").write_text("text,label\nq,\n")
    [third] = read(tmp_path / "c.csv")
    assert isinstance(third, Bad) and third.rule == "no-answer"
    asked = next(iter(read(tmp_path / "a.jsonl", need_answer=False)))
    assert isinstance(asked, Row) and not asked.example.is_text  # To be answered it is a question.


def test_a_text_is_learned_whole_and_judged_by_its_tokens(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(learning_rate=1e-2, num_train_epochs=3.0, per_device_train_batch_size=4, memory={"size": 100})
    lines = [json.dumps({"text": f"page {number} of the book says {number * 7} and no more"}) for number in range(20)]
    (ws.inbox / "book").mkdir()
    (ws.inbox / "book" / "pages.jsonl").write_text("\n".join(lines))
    first = ws.update()
    assert first is not None
    assert first.manifest["metrics"] == {"book": "token_accuracy"}
    assert 0.2 < first.scores["book"] <= 1.0
    results = read_results(first.folder / RESULTS)
    assert {(result.metric, result.prediction) for result in results} == {("token_accuracy", "")}
    ws.ingest(toy_rows("pens", 20), task="pens")
    second = ws.update()  # With texts in memory, their logits and all.
    assert second is not None and second.manifest["memory"]["book"] > 0
    assert export(ws, tmp_path / "out.jsonl", "text", "book")["rows"] == 18
    other = workspace("other")
    assert other.ingest(tmp_path / "out.jsonl", task="book").accepted == 18
    assert export(ws, tmp_path / "out.json", "openai")["left_out"] == {"it is plain text": 18}


def test_all_tokens_but_the_first_are_learned(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello <there>")
    [row] = read(tmp_path / "a.txt", note=lambda _: None)
    assert isinstance(row, Row)
    tokenizer = load_tokenizer(model_folder, False)
    tokens = encode(tokenizer, row.example)
    assert tokenizer.decode(tokens.ids) == "hello <there>"
    assert tokens.answers == list(range(1, len(tokens.ids)))


@pytest.mark.parametrize("experts", [False, True])
def test_texts_go_with_experts_too(workspace: MakeWorkspace, experts: bool) -> None:
    ws = workspace(adapter_composition="experts" if experts else "continue", max_steps=2, gate={"floor": 1.0})
    ws.ingest([{"text": f"page {number} of the book says {number * 7}"} for number in range(12)], task="book")
    assert ws.update() is not None
