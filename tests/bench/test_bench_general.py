"""What a model can do besides its tasks: perplexity, general questions, tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import pytest
import torch

from treering import experts
from treering.bench import general
from treering.config import Config
from treering.data.example import normalise
from treering.errors import UsageError
from treering.experts import Experts
from treering.guides import Guide
from treering.methods import Methods
from treering.model import load_base, load_tokenizer
from treering.router import Router


def test_perplexity_is_that_of_all_tokens_together(model_folder: Path) -> None:
    config = Config.build({"bf16": False})
    model, tokenizer = load_base(model_folder, config), load_tokenizer(model_folder)
    texts = ["a short one", "another text that is somewhat longer than the first", "x"]
    losses = []
    for text in texts:
        ids = torch.tensor([list(tokenizer(text)["input_ids"])])
        probabilities = torch.softmax(model(ids).logits[0].double(), dim=-1).tolist()
        losses += [-math.log(probabilities[at][ids[0, at + 1]]) for at in range(ids.shape[1] - 1)]
    expected = math.exp(sum(losses) / len(losses))
    assert general.perplexity(model, tokenizer, texts, config) == pytest.approx(expected, rel=1e-4)
    assert general.perplexity(model, tokenizer, ["x"], config) is None


def test_a_text_is_read_by_who_would_answer_it(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, texts = Config(bf16=False), ["a text of one kind", "and of another"]
    tokenizer = load_tokenizer(model_folder)
    bare = [general.perplexity(load_base(model_folder, config), tokenizer, [text], config) for text in texts]
    model = Methods(config).prepare(load_base(model_folder, config), {})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    taught = [general.perplexity(model, tokenizer, [text], config) for text in texts]
    experts.attach(model, Experts(Router(4), {"e1": experts.weights(model)}))
    monkeypatch.setattr("treering.guides.guides", lambda *_: [Guide(None), Guide("e1")])
    both = general.perplexity(model, tokenizer, texts, config)
    assert None not in (*bare, *taught, both)
    counts = [len(tokenizer(text)["input_ids"]) - 1 for text in texts]
    logs = [math.log(cast(float, value)) * count for value, count in zip((bare[0], taught[1]), counts, strict=True)]
    assert both == pytest.approx(math.exp(sum(logs) / sum(counts)), rel=1e-4) and bare[0] != taught[0]


def test_answers_are_whole_words() -> None:
    assert general.says("The capital of France is Paris.", ["paris"])
    assert general.says("It was painted by Leonardo da Vinci", ["da vinci"])
    assert not general.says("Parisian", ["paris"]) and not general.says("57", ["5", "7"])


def test_the_questions_are_short_and_their_answers_normalised() -> None:
    rows = [json.loads(line) for line in general.QUESTIONS.read_text().splitlines()]
    assert len(rows) >= 20 and len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert row["answers"] == [normalise(answer) for answer in row["answers"]]
        assert not general.says(row["question"], row["answers"])  # Repeating the question is no answer.


def test_texts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "a.txt").write_text("one\nmore\n\ntwo\n")
    assert general.texts(tmp_path / "a.jsonl") == ["one", "two"] and general.texts(tmp_path / "a.txt") == [
        "one\nmore",
        "two",
    ]
    (tmp_path / "b.jsonl").write_text('{"words": "one"}\n')
    (tmp_path / "c.txt").write_text("\n")
    for name, words in (("b.jsonl", "no text"), ("c.txt", "holds no text"), ("d.txt", "is no file")):
        with pytest.raises(UsageError, match=words):
            general.texts(tmp_path / name)
    with pytest.raises(UsageError, match=r"mine\.yaml is no file"):
        general.Asked.of(None, ["mine.yaml"])


def test_a_task_of_the_harness_from_a_local_file(tmp_path: Path, model_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"question": "1 + 1 =", "choices": ["2", "a long wrong answer"], "right": at % 2} for at in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{right}}'\n"
        "metric_list: [{metric: acc}]\n"
    )
    asked = general.Asked.of(None, [str(tmp_path / "sums.yaml")])
    assert asked is not None
    config = Config.build({"bf16": False})
    model, tokenizer = load_base(model_folder, config), load_tokenizer(model_folder)
    found = general.measure(model, tokenizer, model_folder, None, config, asked)
    # The same answer to the same question every time: right in half of the rows, whichever it is.
    assert found["tasks"]["sums"]["acc"] == 0.5 and found["perplexity"] is None
