"""Preference pairs: kept, learned against each other as TRL does, judged by which answer is likelier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import Run, settings
from treering import Workspace, registry
from treering.batches import as_step, make_batch
from treering.data.example import Example
from treering.data.export import export
from treering.data.read import read
from treering.data.shapes import convert
from treering.data.values import RowError
from treering.errors import UpdateInterruptedError
from treering.handover import Handover
from treering.model import encode, logits_at
from treering.preference import loss
from treering.results import RESULTS, read_results
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]


def pair(number: int, good: str = "yes", bad: str = "no") -> dict[str, Any]:
    return {"prompt": f"is {number} a number, and {chr(97 + number % 26)} a letter?", "chosen": good, "rejected": bad}


def example(number: int, good: str = "yes", bad: str = "no") -> Example:
    return convert(pair(number, good, bad), pairs=True)


Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
RECORDS: list[dict[str, Any]] = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"question": "q", "chosen": [A], "rejected": B},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    {"chosen": [Q, A], "rejected": [Q, B]},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
]


@pytest.mark.parametrize("record", RECORDS, ids=str)
def test_both_answers_are_kept(record: dict[str, Any]) -> None:
    found = convert(record, pairs=True)
    assert found.answer == "a" and found.rejected is not None and found.rejected.answer == "b"
    assert found.rejected.prompt == found.prompt
    assert Example.of(found.as_dicts()) == found
    plain = convert(record)
    assert plain.rejected is None and plain.answer == "a" and plain.id != found.id


@pytest.mark.parametrize(
    ("rejected", "words"),
    [
        ("", None),
        ("A.", "say the same"),
        (0.5, "rejected is a number"),
        ([{"role": "user", "content": "b"}], "rejected has no answer"),
    ],
)
def test_what_is_no_pair(rejected: object, words: str | None) -> None:
    record = {"prompt": "q", "chosen": "a", "rejected": rejected}
    if words is None:
        assert convert(record, pairs=True).rejected is None
    else:
        with pytest.raises(RowError, match=words):
            convert(record, pairs=True)


def test_the_loss_is_that_of_the_paper(model_folder: Path) -> None:
    """Against the formula, with the sums of log-probabilities taken row by row; other rows have their cross entropy."""
    run = Run(model_folder, settings(model_folder))
    rows = [example(1), example(2, "certainly", "never at all")]
    plain = encode(run.tokenizer, convert({"prompt": "q", "completion": "an answer"}))
    tokens = []
    for row, margin in zip(rows, (0.3, -1.2), strict=True):
        assert row.rejected is not None
        made = encode(run.tokenizer, row)
        tokens.append(type(made)(row.id, made.ids, made.answers, [], encode(run.tokenizer, row.rejected), margin))

    def log_probability(one: Any) -> float:
        with torch.no_grad():
            logits = run.model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
        return math.fsum(logits[at - 1, one.ids[at]].item() for at in one.answers)

    wanted = [
        -math.log(1 / (1 + math.exp(-0.2 * (log_probability(one) - log_probability(one.rejected) - one.margin))))
        for one in tokens
    ]
    batches = as_step([make_batch([tokens[0], plain], run.pad_id), make_batch([tokens[1]], run.pad_id)])
    assert [batch.of for batch in batches] == [len(plain.answers)] * 2
    found = []
    with torch.no_grad():
        for batch in batches:
            assert batch.pairs is not None and batch.plain is not None
            logits = logits_at(run.model, **batch.inputs, at=batch.at)
            found.append(loss(batch.pairs, logits, batch.targets, 0.2).item())
            assert len(batch.plain) == (len(plain.answers) if batch is batches[0] else 0)
        assert [run.tokenizer.decode(batches[0].targets[batches[0].plain])] == ["an answer<|im_end|>"]
    assert found == pytest.approx([each / 2 for each in wanted], rel=1e-4)


def test_a_pair_is_learned_and_judged(workspace: MakeWorkspace) -> None:
    ws = workspace(stage="dpo", learning_rate=5e-3, num_train_epochs=4.0, per_device_train_batch_size=8, protect=[])
    ws.ingest([pair(number, "maybe it is so", "surely not") for number in range(40)], task="tone")
    version = ws.update()
    assert version is not None and version.manifest["metrics"] == {"tone": "preference"}
    log = [json.loads(line) for line in (version.folder / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # Before the first step it is the reference.
    assert log[-1]["loss"] < 0.3
    assert version.scores["tone"] == 1.0
    assert {result.prediction for result in read_results(version.folder / RESULTS)} == {""}


def test_pairs_are_remembered_and_replayed_beside_other_rows(workspace: MakeWorkspace) -> None:
    ws = workspace(stage="dpo", max_steps=2, memory={"size": 50}, gate={"floor": 1.0, "margin": 1.0})
    ws.ingest([pair(number) for number in range(20)], task="tone")
    assert ws.update() is not None
    ws.ingest(toy_rows("pens", 20), task="pens")
    version = ws.update()
    assert version is not None and version.manifest["memory"]["tone"] > 0
    assert version.manifest["choices"]["learning_rate"]["reason"] == "5% of the default for lora, for preference pairs"


def test_without_dpo_the_chosen_answers_are_learned(workspace: MakeWorkspace) -> None:
    ws = workspace()
    found = ws.ingest([pair(number) for number in range(20)], task="tone")
    assert found.accepted == 20
    assert all(row.rejected is None for row in ws.catalog.examples(ws.catalog.train_ids("tone")).values())


def test_an_interrupted_one_ends_in_the_same_bytes(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from tests.training import StopAt
    from treering import pipeline

    def update(name: str, *looks: int) -> bytes:
        ws = workspace(name, stage="dpo", learning_rate=1e-3, num_train_epochs=1.0, per_device_train_batch_size=4)
        ws.ingest([pair(number) for number in range(20)], task="tone")
        for look in looks:
            with monkeypatch.context() as patch:
                patch.setattr(pipeline, "stop_on_signals", lambda look=look: nullcontext(StopAt(look)))
                with pytest.raises(UpdateInterruptedError):
                    ws.update()
        ws.update()
        return (registry.versions(ws)[-1].folder / "adapter_model.safetensors").read_bytes()

    assert update("stopped", 60, 400, 700) == update("whole")


def test_pairs_go_to_other_processes(tmp_path: Path, model_folder: Path) -> None:
    run = Run(model_folder, settings(model_folder))
    row = example(1)
    assert row.rejected is not None
    made = encode(run.tokenizer, row)
    tokens = type(made)(row.id, made.ids, made.answers, [], encode(run.tokenizer, row.rejected), 0.5)
    given = Handover(run.config, model_folder, None, {row.id: tokens}, [[[row.id]]], 0, 1, tmp_path / "c")
    given.save(tmp_path)
    assert Handover.load(tmp_path).rows == {row.id: tokens}


@pytest.mark.parametrize("name", ["a.json-alpaca", "o.jsonl-openai", "s.json-sharegpt"])
def test_pairs_come_out_again(workspace: MakeWorkspace, tmp_path: Path, name: str) -> None:
    ws = workspace(stage="dpo", val_size=0.0)
    ws.ingest([pair(number) for number in range(5)], task="tone")
    file, _, format = name.partition("-")
    assert export(ws, tmp_path / file, format)["rows"] == 5
    notes: list[str] = []
    rows = list(read(tmp_path / file, pairs=True, note=notes.append))
    assert {row.example.id for row in rows if row.example} == set(ws.catalog.train_ids("tone"))
    assert notes == ["5 preference pairs, both of whose answers are kept (stage: dpo)"]
    gone = ws.catalog.train_ids("tone")[0]
    assert ws.forget([gone]).exports == [str(tmp_path / file)]
    left = {row.example.id for row in read(tmp_path / file, pairs=True, note=lambda _: None) if row.example}
    assert left == set(ws.catalog.train_ids("tone")) and len(left) == 4
    assert list(read(tmp_path / file, note=notes.append)) and "the rejected ones are not kept" in notes[-1]
