"""Each rule by an example that breaks it and one that just does not."""

from __future__ import annotations

import pytest

from treering.data.check import check
from treering.data.example import Example


def example(question: str, answer: str = "an answer") -> Example:
    return Example.of([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def words(row: Example) -> int:
    return sum(len(turn.content.split()) for turn in row.messages)


@pytest.mark.parametrize("question", ["fine", "tab\tand\r\nlines", "?", "x " * 6])
def test_good_rows_pass(question: str) -> None:
    assert check(example(question, "!!"), words, cutoff_len=7) is None


@pytest.mark.parametrize(
    ("row", "rule", "reason"),
    [
        (example(" "), "empty-question", "last user turn is empty"),
        (example("Lost card", " lost  CARD. "), "answer-equals-question", "' lost  CARD. ' repeats"),
        (example("bell\x07"), "control-characters", "turn 1 holds U+0007 at character 5"),
        (example("fine", "\x00"), "control-characters", "turn 2 holds U+0000"),
        (example("one two three four five six"), "too-long", "8 tokens are more than cutoff_len=7; shorten"),
    ],
)
def test_bad_rows_are_named(row: Example, rule: str, reason: str) -> None:
    found = check(row, words, cutoff_len=7)
    assert found is not None
    assert found[0] == rule
    assert reason in found[1]


def test_what_the_chat_template_refuses_is_named() -> None:
    def refuses(row: Example) -> int:
        raise ValueError("Conversation roles must alternate")

    found = check(example("fine"), refuses, cutoff_len=7)
    assert found is not None
    assert found[0] == "template-refuses" and "template refuses it (Conversation roles must alternate)" in found[1]


def test_the_last_question_counts() -> None:
    turns = [("user", ""), ("assistant", "what?"), ("user", "this"), ("assistant", "what?")]
    assert check(Example.of([{"role": role, "content": text} for role, text in turns]), words, 9) is None


def test_a_row_without_an_answer_does_not_repeat_its_question() -> None:
    assert check(Example.of([{"role": "user", "content": "hello"}]), words, 9) is None
