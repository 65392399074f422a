"""Guesses: taken as far as they are right, and chosen among what is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from treering.config import Config
from treering.data.example import Message
from treering.greedy import Answer, Known, generate
from treering.model import load_base, load_tokenizer

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
