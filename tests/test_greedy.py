"""Guesses: taken as far as they are right, and chosen among what is known."""

from __future__ import annotations

import pytest

from treering.greedy import Answer, Known

END = 0


@pytest.mark.parametrize(
    ("guess", "likeliest", "written", "ended"),
    [
        ([5, 6, END], [5, 6, END], [5, 6], True),
        ([5, 6, END], [5, 7, 8], [5, 7], False),  # What comes after the first wrong token answers another question.
        ([5, 6, END], [5, 6, 9], [5, 6, 9], False),
        ([5, 6, END], [END, 6, 9], [], True),
        ([5, 6, 7, 8, END], [5, 6, 7, 8, END], [5, 6, 7, 8], True),
        ([5, 6, 7, 8, 9, END], [5, 6, 7, 8, 9, END], [5, 6, 7, 8], True),  # As many as it may have.
        ([5, 6, 7, 8, 9, END], [5, 6, 7, 9, 9, END], [5, 6, 7, 9], True),
    ],
)
def test_a_guess_is_taken_as_far_as_it_is_right(
    guess: list[int], likeliest: list[int], written: list[int], ended: bool
) -> None:
    answer = Answer([1], 4)
    answer.take(guess, likeliest, END)
    assert (answer.written, answer.ended) == (written, ended)


def test_the_most_frequent_answer_that_fits_is_guessed() -> None:
    known = Known([[5, 6, END], [5, 7, END], [5, 7, END], [8, END]])
    assert known.guess([]) == (5, 7, END)
    assert known.guess([5]) == (7, END)
    assert known.guess([5, 6]) == (END,)
    assert known.guess([8]) == (END,)
    assert known.guess([9]) is None and known.guess([5, 7, END]) is None
    assert Known(()).guess([]) is None
