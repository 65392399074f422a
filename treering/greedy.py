"""What greedy decoding writes, mostly without decoding: a guess that is read once is right as far as it goes.

One pass over a prompt and a guess gives the likeliest token after each of them, so the answer is known up to the first
token in which the guess is wrong, and that token too. Labels are guessed from those known: the right one first, then
the most frequent of those that begin as the answer does, then the end. What has long to go is generated token by token.
(Speculative decoding, Leviathan et al. 2022, arXiv:2211.17192, with known answers in place of a draft model.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treering.batches import Batch
from treering.data.example import Message
from treering.model import Tokens, compute, encode_prompt, lean_output, pad, use_bf16
from treering.passes import read
from treering.progress import Advance, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config
    from treering.stop import Stop

SHORT = 4
"""Tokens that are found sooner by a pass each than by `generate`, which begins with a pass of its own."""


@dataclass
class Answer:
    """An answer on its way: token ids of its prompt, how many it may have, those written, and whether that is all."""

    prompt: list[int]
    limit: int
    written: list[int] = field(default_factory=list)
    ended: bool = False

    def take(self, guess: Sequence[int], likeliest: Sequence[int], end: int) -> None:
        """Go on by `guess` as far as it is right, and by the token that is written instead of the first wrong one."""
        for guessed, token in zip(guess, likeliest, strict=True):
            self.ended = token == end or len(self.written) == self.limit
            if self.ended:
                return
            self.written.append(token)
            if token != guessed:
                break
        self.ended = len(self.written) == self.limit


class Known:
    """Answers that are worth a guess, each with its end mark."""

    def __init__(self, answers: Iterable[Sequence[int]]) -> None:
        counts = Counter(map(tuple, answers))
        self._answers = sorted(counts, key=lambda answer: (-counts[answer], answer))

    def guess(self, written: Sequence[int]) -> Sequence[int] | None:
        """What the most frequent of those that begin with `written` has after it."""
        begun, count = tuple(written), len(written)
        return next((answer[count:] for answer in self._answers if answer[:count] == begun and answer[count:]), None)


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Answer],
    known: Known,
    config: Config,
    *,
    advance: Advance = silent,
    stop: Stop | None = None,
) -> list[str]:
    """Write all `answers` to their ends; returns their texts."""
    end, pad_id = cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id)

    def guess(answer: Answer) -> Sequence[int] | None:
        near = answer.limit - len(answer.written) <= SHORT
        return known.guess(answer.written) or ([end] if near else None)

    while guessed := [(a, found) for a in answers if not a.ended and (found := guess(a))]:
        rows = [_with_guess(at, answer, found) for at, (answer, found) in enumerate(guessed)]
        passed = read(model, rows, likeliest, config, pad_id, silent, stop)
        for (answer, found), tokens in zip(guessed, passed, strict=True):
            answer.take(found, tokens, end)
        advance(sum(answer.ended for answer, _ in guessed))
    left = sorted((a for a in answers if not a.ended), key=lambda a: len(a.prompt) + len(a.written))
    for start in range(0, len(left), config.eval.batch_size):
        if stop is not None:
            stop.check()
        part = left[start : start + config.eval.batch_size]
        _decode(model, part, config, end, pad_id)
        advance(len(part))
    return [str(tokenizer.decode(a.written, skip_special_tokens=True)).strip() for a in answers]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    limits: Sequence[int],
    config: Config,
    *,
    advance: Advance = silent,
) -> list[str]:
    """Greedy answers to `prompts`, in their order, each at most its own number of tokens long."""
    model.eval()
    answers = [Answer(encode_prompt(tokenizer, p), limit) for p, limit in zip(prompts, limits, strict=True)]
    return write(model, tokenizer, answers, Known(()), config, advance=advance)


def likeliest(batch: Batch, logits: Tensor) -> list[list[int]]:
    """The likeliest token at each answer position, a list a row."""
    return [part.tolist() for part in logits.argmax(-1).split(batch.counts)]


def _with_guess(at: int, answer: Answer, guess: Sequence[int]) -> Tokens:
    ids = [*answer.prompt, *answer.written, *guess]
    return Tokens(f"{at:09}", ids, list(range(len(ids) - len(guess), len(ids))))


@torch.no_grad()
def _decode(model: PreTrainedModel, answers: Sequence[Answer], config: Config, end: int, pad_id: int) -> None:
    """Write to their ends token by token."""
    lean_output(model)
    inputs = pad([[*a.prompt, *a.written] for a in answers], pad_id, left=True)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with compute(use_bf16(config)[0], model.device):
        written = cast(Any, model).generate(
            **inputs,
            max_new_tokens=max(a.limit - len(a.written) for a in answers),
            do_sample=False,
            # Plain greedy, whatever the model's own generation_config.json asks for.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=end,
            pad_token_id=pad_id,
        )
    for answer, row in zip(answers, written[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        own = row[: row.index(end)] if end in row else row
        answer.written = [*answer.written, *own][: answer.limit]
        answer.ended = True
