"""When rows say nearly the same, and when they contradict each other."""

from __future__ import annotations

import pytest

from treering.data.alike import COMMON, ENOUGH, Common, Said, words
from treering.data.example import Example

BLANK = Common()


def row(question: str, answer: str = "yes", system: str = "") -> Example:
    head = [{"role": "system", "content": system}] if system else []
    return Example.of([*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def said(question: str, answer: str = "yes", system: str = "") -> Said:
    return Said.of(row(question, answer, system))


def alike(one: Said, other: Said, threshold: float = 0.8) -> bool:
    assert one.like(other, BLANK, threshold) == other.like(one, BLANK, threshold)
    return one.like(other, BLANK, threshold)


LONG = "please tell me how I can send the lamp back that I bought from you"


@pytest.mark.parametrize(
    "other",
    [LONG, f"{LONG}!", LONG.upper(), LONG.replace("please ", ""), LONG.replace("tell me how I can", "how can I")],
)
def test_small_changes_say_the_same(other: str) -> None:
    assert alike(said(LONG), said(other))


@pytest.mark.parametrize(
    ("question", "answer", "system"),
    [
        (LONG.replace("lamp", "chair").replace("bought", "got"), "yes", ""),
        (LONG, "no", ""),
        (LONG, "yes", "Be brief."),
        ("", "yes", ""),
    ],
)
def test_other_words_answers_and_systems_do_not(question: str, answer: str, system: str) -> None:
    assert not alike(said(LONG), said(question, answer, system))


def test_numbers_tell_rows_apart() -> None:
    one, other = (
        f"where is the parcel of order {number} that I was promised for last monday" for number in ("17", "18")
    )
    assert not alike(said(one), said(other))
    assert alike(said(one), said(one.replace("the parcel", "my parcel")))


def test_long_answers_need_not_be_the_very_same() -> None:
    answer = "send it back within two weeks and we will pay for the parcel"
    assert alike(said(LONG, answer), said(LONG, answer.replace("it back", "the lamp back")))
    assert not said(LONG, answer).contradicts(said(LONG, answer.replace("it back", "the lamp back")), 0.8)
    assert not alike(said(LONG, answer), said(LONG, answer.replace("two", "2")))


def test_what_all_rows_of_a_task_have_tells_none_apart() -> None:
    head = "sort the message of the customer into one of these labels please and answer with the label alone"
    messages = [f"{word} {word}ing {word}ed" for word in ("walk", "jump", "look", "cook", "play")]
    one, other = (said(f"{head}: {message}") for message in messages[:2])
    assert alike(one, other, 0.7)
    common = Common()
    common.learn(said(f"{head}: {messages[at % 5]}").words for at in range(ENOUGH))
    assert not one.like(other, common, 0.7)
    assert common.without(words("the label")) == words("the label")  # Nothing else would be left.
    short = [said(f"{head}: {word}") for word in ("adventure", "cheesy")]
    assert not short[0].like(short[1], common, 0.75) and short[0].like(short[0], common, 0.75)
    kept = Common.of(common.rows, common.kept())
    assert kept.without(one.words) == common.without(one.words) == words(messages[0])
    assert COMMON < 1


def test_scripts_without_blanks_are_compared_by_character() -> None:
    assert words("我的订单在哪里") == frozenset("我的订单在哪里")
    assert alike(said("请问我的订单现在在哪里呢"), said("请问我的订单现在在哪里"))


@pytest.mark.parametrize(
    ("question", "answer", "against"),
    [("How much is it?", "two", True), ("how much is IT", "One.", False), ("How much was it?", "two", False)],
)
def test_the_same_question_with_another_answer_contradicts(question: str, answer: str, against: bool) -> None:
    assert said("How much is it?", "one").contradicts(said(question, answer), 0.8) == against


def test_an_answer_of_punctuation_is_an_answer() -> None:
    assert said("a question", "?").contradicts(said("a question", "!"), 0.8)
