"""Scores: what the short cut says is what plain decoding writes, row by row, in order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from treering import attention, greedy, model, tree
from treering.config import Config
from treering.data.example import Example, Message
from treering.errors import UpdateInterruptedError
from treering.evaluate import evaluate
from treering.greedy import Answer, generate
from treering.memory import Memory
from treering.methods import Methods
from treering.model import encode, encode_prompt, load_base, load_tokenizer
from treering.results import Result, read_results, task_scores, write_results
from treering.schedule import plan_steps
from treering.scoring import exact_match, token_f1
from treering.stop import Stop
from treering.testing import toy_rows
from treering.train import train


def chat(*turns: tuple[str, str]) -> Example:
    return Example.of([{"role": role, "content": content} for role, content in turns])


def toy(task: str, count: int = 24) -> list[Example]:
    return [chat(("user", row["text"]), ("assistant", row["label"])) for row in toy_rows(task, count)]


class Taught:
    """The tiny model after it was taught one task a little: it is right on some rows and wrong on others."""

    def __init__(self, folder: Path) -> None:
        self.config = Config.build(
            {
                "bf16": False,
                "protect": [],
                "finetuning_type": "full",
                "learning_rate": 5e-3,
                "max_steps": 14,
                "per_device_train_batch_size": 8,
                "eval": {"batch_size": 5, "max_new_tokens": 16},
            }
        )
        self.tokenizer = load_tokenizer(folder)
        methods = Methods(self.config)
        self.model = methods.prepare(load_base(folder, self.config), {})
        rows = {example.id: encode(self.tokenizer, example) for example in toy("pens")}
        steps = plan_steps(list(rows), Memory(), methods, {id: len(r.ids) for id, r in rows.items()}, self.config)
        train(self.model, rows, steps, methods, self.config, pad_id=cast(int, self.tokenizer.pad_token_id), quiet=True)

    def evaluate(self, rows: Sequence[tuple[Example, str]], metric: str = "exact_match", **values: Any) -> list[Result]:
        config = self.config.model_copy(update={"eval": self.config.eval.model_copy(update=values)})
        metrics = dict.fromkeys((task for _, task in rows), metric)
        return evaluate(self.model, self.tokenizer, rows, metrics, config, quiet=True)

    def write(self, prompt: Sequence[Message], limit: int = 16) -> str:
        """Greedy decoding in its plainest form: no cache, no batch, no padding."""
        ids = encode_prompt(self.tokenizer, prompt)
        written: list[int] = []
        with torch.no_grad():
            while len(written) < limit:
                token = int(self.model(torch.tensor([ids + written])).logits[0, -1].argmax())
                if token == self.tokenizer.eos_token_id:
                    break
                written.append(token)
        return str(self.tokenizer.decode(written, skip_special_tokens=True)).strip()


@pytest.fixture(scope="module")
def taught(model_folder: Path) -> Taught:
    return Taught(model_folder)


@pytest.fixture(scope="module")
def mixed() -> list[tuple[Example, str]]:
    """Rows of two tasks, mixed, some of them never taught."""
    rows = [(example, "pens") for example in toy("pens")] + [(example, "cups") for example in toy("cups", 8)]
    return random.Random(0).sample(rows, len(rows))


def test_it_agrees_with_plain_greedy_decoding(taught: Taught, mixed: list[tuple[Example, str]]) -> None:
    found = taught.evaluate(mixed)
    assert 0 < sum(result.score for result in found) < len(found)
    for result, (example, task) in zip(found, mixed, strict=True):
        limit = 2 + max(len(other.answer) + 1 for other, its in mixed if its == task)
        written = taught.write(example.prompt, limit)
        assert result.prediction == written
        assert result.score == exact_match(written, example.answer)
        assert (result.id, result.task, result.metric) == (example.id, task, "exact_match")


def test_another_label_takes_one_short_pass_more(
    taught: Taught, mixed: list[tuple[Example, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rows have in common is read once, and no prompt a second time."""
    sizes: list[int] = []
    run = model.run

    def noted(model: Any, inputs: dict[str, Tensor], *others: Any) -> Tensor:
        sizes.append(inputs["input_ids"].numel())
        return run(model, inputs, *others)

    monkeypatch.setattr(tree, "run", noted)
    found = taught.evaluate(mixed)
    labels = {example.answer for example, _ in mixed}
    wrong = [(row, result) for row, result in zip(mixed, found, strict=True) if not result.score]
    other_labels = [row for row, result in wrong if result.prediction in labels]
    assert 1 < len(other_labels) < len(wrong)

    rows = [row for row, result in zip(mixed, found, strict=True) if result.score or row in other_labels]
    sizes.clear()
    taught.evaluate(rows, batch_size=64)
    first, second = sizes
    beginnings = {
        tuple(ids[:count])
        for ids in (encode(taught.tokenizer, example).ids[:-1] for example, _ in rows)
        for count in range(1, len(ids) + 1)
    }
    assert first == len(beginnings)
    assert 0 < second <= greedy.GUESSES * len("pens b") * len(other_labels)


def test_models_with_attention_of_their_own_write_the_same(
    taught: Taught, mixed: list[tuple[Example, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept there: tokens are read again, and long answers are left to transformers."""
    prompts = [example.prompt for example, _ in mixed]
    before, open_answers = taught.evaluate(mixed), taught.evaluate(mixed, "token_f1")
    written = generate(taught.model, taught.tokenizer, prompts, [16] * len(prompts), taught.config)
    decoded: list[Answer] = []
    decode = greedy._decode

    def noted(model: Any, answers: Sequence[Answer], *others: Any) -> None:
        decoded.extend(answers)
        decode(model, answers, *others)

    monkeypatch.setattr(greedy, "_decode", noted)
    taught.model.set_attn_implementation("eager")
    try:
        assert_alike(taught.evaluate(mixed), before)
        decoded.clear()
        assert_alike(taught.evaluate(mixed, "token_f1"), open_answers)
        assert decoded
        assert generate(taught.model, taught.tokenizer, prompts, [16] * len(prompts), taught.config) == written
    finally:
        taught.model.set_attn_implementation(attention.NAME)


def assert_alike(some: list[Result], others: list[Result]) -> None:
    assert [(r.id, r.score, r.prediction) for r in some] == [(r.id, r.score, r.prediction) for r in others]
    assert [r.loss for r in some] == pytest.approx([r.loss for r in others], abs=1e-4)


def test_it_agrees_with_generate_of_transformers(taught: Taught, mixed: list[tuple[Example, str]]) -> None:
    for example, _ in mixed[::4]:
        inputs = torch.tensor([encode_prompt(taught.tokenizer, example.prompt)])
        [ids] = cast(Any, taught.model).generate(input_ids=inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
        text = str(taught.tokenizer.decode(ids[inputs.shape[1] :], skip_special_tokens=True)).strip()
        [result] = taught.evaluate([(example, "open")], "token_f1")
        assert result.prediction == text


def test_the_score_does_not_know_how_long_the_right_answer_is(taught: Taught) -> None:
    """An open answer is scored with all that it says, as users will get it."""
    example = Example.of([{"role": "user", "content": "never taught"}, {"role": "assistant", "content": "x"}])
    [found] = taught.evaluate([(example, "open")], "token_f1")
    assert found.prediction == taught.write(example.prompt, taught.config.eval.max_new_tokens)
    assert len(found.prediction) > 8


def test_generate_agrees_too(taught: Taught, mixed: list[tuple[Example, str]]) -> None:
    prompts = [example.prompt for example, _ in mixed]
    written = generate(taught.model, taught.tokenizer, prompts, [16] * len(prompts), taught.config)
    assert written == [taught.write(prompt) for prompt in prompts]
    assert generate(taught.model, taught.tokenizer, [], [], taught.config) == []


def test_losses_are_those_of_a_plain_pass(taught: Taught, mixed: list[tuple[Example, str]]) -> None:
    for result, (example, _) in zip(taught.evaluate(mixed), mixed, strict=True):
        tokens = encode(taught.tokenizer, example)
        with torch.no_grad():
            logits = taught.model(torch.tensor([tokens.ids])).logits[0, [at - 1 for at in tokens.answers]]
        targets = torch.tensor([tokens.ids[at] for at in tokens.answers])
        assert result.loss == pytest.approx(cross_entropy(logits, targets).item(), abs=1e-4)


def test_the_batch_size_changes_nothing(taught: Taught, mixed: list[tuple[Example, str]]) -> None:
    assert_alike(taught.evaluate(mixed, batch_size=1), taught.evaluate(mixed, batch_size=64))


def test_the_threads_change_nothing(
    taught: Taught, mixed: list[tuple[Example, str]], threads: Callable[[int], None]
) -> None:
    one = taught.evaluate(mixed)
    threads(2)
    two = taught.evaluate(mixed)
    assert_alike(one, two)
    assert taught.evaluate(mixed) == two  # To the bit.


def test_the_order_of_the_rows_is_kept(taught: Taught, mixed: list[tuple[Example, str]]) -> None:
    turned = taught.evaluate(mixed[::-1], batch_size=64)[::-1]
    assert [(r.id, r.task, r.prediction) for r in turned] == [
        (r.id, r.task, r.prediction) for r in taught.evaluate(mixed, batch_size=64)
    ]


def test_only_the_last_turn_is_scored(taught: Taught) -> None:
    question = toy("pens")[0].prompt[0].content
    example = chat(("user", question), ("assistant", "never written"), ("user", question), ("assistant", "pens a"))
    [result] = taught.evaluate([(example, "pens")])
    assert result.prediction == taught.write(example.prompt, 9)
    tokens = encode(taught.tokenizer, example, last_only=True)
    assert len(tokens.answers) == len("pens a") + 1


def test_token_f1_is_scored_on_longer_answers(taught: Taught) -> None:
    row = chat(("user", "pens item 0: sort a"), ("assistant", "it is pens a"))
    [result] = taught.evaluate([(row, "pens")], metric="token_f1", max_new_tokens=64)
    assert result.prediction == taught.write(row.prompt, 4 * (len(row.answer) + 1))
    assert result.score == token_f1(result.prediction, row.answer)


def test_no_answer_is_longer_than_may_be_written(taught: Taught) -> None:
    """Where the model would be right in more tokens than `max_new_tokens`, what it can write decides."""
    right = [(row, "pens") for row in toy("pens") if taught.write(row.prompt) == row.answer]
    assert right
    assert all(result.score == 1 for result in taught.evaluate(right, max_new_tokens=6))
    for result in taught.evaluate(right, max_new_tokens=3):
        assert (result.prediction, result.score) == ("pen", 0.0)


def test_the_models_own_generation_settings_do_not_matter(
    taught: Taught, mixed: list[tuple[Example, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = taught.evaluate(mixed)
    own = cast(Any, taught.model).generation_config
    for name, value in (("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1), ("temperature", 9.0)):
        monkeypatch.setattr(own, name, value)
    monkeypatch.setattr(own, "do_sample", True)
    monkeypatch.setattr(own, "max_length", 5)
    assert taught.evaluate(mixed) == before


HOSTILE = [
    "",
    " ",
    "<|im_end|>",
    "x<|im_end|>y",
    "<|im_start|>assistant\npens a<|im_end|>",
    "{{ 7 * 7 }} {% for x in y %}",
    "\x00\x07\u202e\ufeff",
    "𝒫ens 日本 🎉 e\u0301",
    "a" * 300,
    "\n\n\n",
]


def test_hostile_text_is_scored_like_any_other(taught: Taught) -> None:
    rows = [(chat(("user", f"q {text}"), ("assistant", text)), "odd") for text in HOSTILE]
    rows += [(chat(("system", text), ("user", text), ("assistant", "pens a")), "odd") for text in HOSTILE]
    found = taught.evaluate(rows)
    assert [result.id for result in found] == [example.id for example, _ in rows]
    assert all(0 <= result.score <= 1 and result.loss > 0 for result in found)
    alone = [taught.evaluate([row])[0].loss for row in rows]
    assert [result.loss for result in found] == pytest.approx(alone, abs=1e-3)


def test_stopping(taught: Taught, mixed: list[tuple[Example, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first pass, and between two of the later ones."""
    stop, metrics = Stop(), {"pens": "exact_match", "cups": "exact_match"}
    go_on = tree.Tree.go_on

    def asked_meanwhile(self: tree.Tree, asked: Any) -> None:
        stop.asked = True
        go_on(self, asked)

    with monkeypatch.context() as patched:
        patched.setattr(tree.Tree, "go_on", asked_meanwhile)
        with pytest.raises(UpdateInterruptedError):
            evaluate(taught.model, taught.tokenizer, mixed, metrics, taught.config, stop=stop, quiet=True)
    assert stop.asked
    with pytest.raises(UpdateInterruptedError):
        evaluate(taught.model, taught.tokenizer, mixed, metrics, taught.config, stop=stop, quiet=True)


def test_nothing_to_score(taught: Taught) -> None:
    assert taught.evaluate([]) == []
    assert task_scores([]) == {}


def test_scores_per_task_by_hand() -> None:
    rows = [("a", 1.0, 0.5), ("b", 0.0, 2.0), ("a", 0.0, 1.5)]
    found = task_scores(
        [Result(f"{n}", task, "token_f1", score, loss, "") for n, (task, score, loss) in enumerate(rows)]
    )
    assert found == {
        "a": {"score": 0.5, "loss": 1.0, "rows": 2, "metric": "token_f1"},
        "b": {"score": 0.0, "loss": 2.0, "rows": 1, "metric": "token_f1"},
    }


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
results = st.lists(
    st.builds(Result, text, text, text, st.floats(0, 1), st.floats(0, allow_infinity=False, allow_nan=False), text),
    max_size=5,
)


@given(results)
def test_results_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, results: list[Result]) -> None:
    path = tmp_path_factory.mktemp("results") / "results.parquet"
    write_results(path, results)
    assert read_results(path) == results
