"""Which texts are alike; what an incoming row is to stored ones is tested where rows come in (`test_intake.py`)."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from treering.data import texts as of_texts
from treering.data.texts import Texts

BALANCE = "what is the balance of my savings account"


def test_texts_are_alike_by_what_they_say() -> None:
    texts = Texts([(BALANCE, "held out"), ("play some jazz in the kitchen", "new")])
    for same in (BALANCE, "  What is the BALANCE of my savings account?", "what is the balance of my savings accounts"):
        assert texts.like(same) == "held out"
    for other in ("what is the limit of my credit card", "play some rock in the attic", "", "?"):
        assert texts.like(other) is None
    texts.add("what is the limit of my credit card", "drawn")
    assert texts.like("what is the limit of my credit card!") == "drawn"


def test_the_first_of_those_that_are_alike_says_which_kind() -> None:
    assert Texts([(BALANCE, "held out"), (BALANCE, "new")]).like(BALANCE) == "held out"


def test_an_instruction_that_all_begin_with_tells_nothing() -> None:
    head = "Sort the message of the customer into one of the labels that you were given, and answer with the label: "
    messages = ["where is my parcel", "the lamp is broken", "cancel the order", "how long is the warranty"]
    texts = Texts([(head + message, "new") for message in messages])
    assert texts.like(f"{head}which colours are there") is None
    assert texts.like(f"{head}where is my parcel?") == "new"


@given(st.lists(st.text("ab c", max_size=12), max_size=12), st.text("ab c", max_size=12))
def test_no_text_that_is_alike_is_passed_over(given_texts: list[str], asked: str) -> None:
    """The heaviest sequences alone are looked up; comparing with every text finds the same."""
    texts = Texts((text, str(at)) for at, text in enumerate(given_texts))
    threes = of_texts._threes(asked)
    plain = [at for at, text in enumerate(given_texts) if texts._alike(threes, of_texts._threes(text))]
    assert texts.like(asked) == (str(plain[0]) if plain else None)


def test_small_changes_of_long_texts_are_alike_and_large_ones_are_not() -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(40)]
    versions = [[*words[:count], *(word[::-1] for word in words[count:])] for count in (40, 38, 20)]
    texts = Texts([(" ".join(words), "held out")])
    found = [texts.like(" ".join(version)) for version in versions]
    assert found == ["held out", "held out", None]
    assert all(len(one) == len(other) for one, other in pairwise(versions))
