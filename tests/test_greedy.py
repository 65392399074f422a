"""Guesses: taken as far as they are right, and chosen among what is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from treering.config import Config
from treering.data.example import Message
from treering.greedy import GUESSES, Answer, Known, generate
from treering.model import load_base, load_tokenizer

END = 0


class Grown:
    """Stands for a tree that has read one way, and what is likeliest after each of its tokens."""

    def __init__(self, way: list[int], likeliest: list[int]) -> None:
        self.likeliest = dict(enumerate(likeliest))
        self._way = way

    def after(self, path: list[int], token: int) -> int | None:
        at = path[-1]
        return at + 1 if at < len(self._way) and self._way[at] == token else None


@pytest.mark.parametrize(
    ("guess", "likeliest", "written", "ended"),
    [
        ([5, 6], [5, 6, END], [5, 6], True),
        ([5, 6], [5, 7, 8], [5], False),  # 7 was not read, so nobody knows what comes after it.
        ([5, 6], [5, 6, 9], [5, 6], False),
        ([5, 6], [END, 6, 9], [], True),
        ([5, 6, 7, 8], [5, 6, 7, 8, END], [5, 6, 7, 8], True),
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9, END], [5, 6, 7, 8], True),  # As many as it may have.
        ([5, 6, 7, 8, 9], [5, 6, 7, 9, 9, END], [5, 6, 7, 9], True),  # The last need not be read.
    ],
)
def test_a_guess_is_taken_as_far_as_it_is_right(
    guess: list[int], likeliest: list[int], written: list[int], ended: bool
) -> None:
    answer = Answer([1], [0], 4)
    answer.walk(cast(Any, Grown(guess, likeliest)), END)
    assert (answer.written, answer.ended) == (written, ended)


def test_the_most_frequent_answers_that_fit_are_guessed() -> None:
    known = Known([[5, 6, END], [5, 7, END], [5, 7, END], [8, END]])
    assert known.guesses([]) == []  # The right answer is read in any case.
    assert known.guesses([5]) == [(7, END), (6, END)]
    assert known.guesses([5, 6]) == [(END,)]
    assert known.guesses([8]) == [(END,)]
    assert known.guesses([9]) == [] and known.guesses([5, 7, END]) == []
    assert Known(()).guesses([]) == []
    many = Known([[5, n, END] for n in range(10, 30)])
    assert many.guesses([5]) == [(n, END) for n in range(10, 10 + GUESSES)]


def test_prompts_reach_the_output_layer_in_one_piece(model_folder: Path) -> None:
    """Of a slice, torch makes a product with a copy of the frozen weights for each row."""
    config = Config(bf16=False)
    model, tokenizer = load_base(model_folder, config), load_tokenizer(model_folder)
    whole: list[bool] = []

    def note(_: torch.nn.Module, given: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
        whole.append(given[0].is_contiguous())

    model.get_output_embeddings().register_forward_hook(note)
    prompts = [[Message(role="user", content=text)] for text in ("one", "another")]
    generate(model, tokenizer, prompts, [2, 2], config)
    assert whole and all(whole)
