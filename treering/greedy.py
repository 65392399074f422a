"""What greedy decoding writes: the way from the end of a prompt down a tree of tokens that were read.

A token that was read tells which is likeliest after it. Where that one was read too, decoding goes on at no cost; where
it was not, it is read in the next pass, together with what may come after it: the ends of known answers that begin so,
as a tree, the right one first. So a label takes a pass or two of a few tokens. What has long to go where nothing that
was read can be kept is generated token by token.
(Speculative decoding, Leviathan et al. 2022, arXiv:2211.17192, with known answers in place of a draft model.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from treering.data.example import Message
from treering.experts import routed
from treering.guides import guides
from treering.methods.recall import Recalled
from treering.model import compute, encode_prompt, lean_output, pad, precision
from treering.progress import Advance, silent
from treering.tree import Path, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.config import Config
    from treering.stop import Stop

SHORT = 4
"""Tokens that are found sooner by a pass each than by `generate`, where every pass reads all again."""

GUESSES = 4
"""Known answers that are tried at once; more tokens would make the pass longer."""


@dataclass
class Answer:
    """An answer on its way: the path of its prompt in a tree, how many tokens it may have, and those written.

    `path` goes on along what is written as far as that was read; `recalled` goes with it, while there is any.
    """

    prompt: Sequence[int]
    path: Path
    limit: int
    recalled: Recalled | None = None
    written: list[int] = field(default_factory=list)
    ended: bool = False

    def walk(self, tree: Tree, end: int) -> None:
        """Go on down `tree` as far as it was read."""
        while not self.ended:
            token = self.next(tree)
            self.ended = token == end or len(self.written) == self.limit
            at = tree.after(self.path, token)
            if self.ended or (at is None and len(self.written) + 1 < self.limit):
                return
            self.written.append(token)
            self.recalled = self.recalled and self.recalled.after(token)
            self.path += [] if at is None else [at]
            self.ended = len(self.written) == self.limit

    def next(self, tree: Tree) -> int:
        """The token that comes after the path."""
        return after(tree, self.path[-1], self.recalled)


def after(tree: Tree, number: int, recalled: Recalled | None) -> int:
    """The token that comes after the one of that number in `tree`.

    Among those that recall does not name the order is the model's, so one that it names comes, or the model's own.
    """
    likeliest = tree.likeliest[number]
    if recalled is None:
        return likeliest

    def likely(token: int) -> tuple[float, bool]:
        return recalled.score(token, math.exp(tree.log_chance(number, token))), token == likeliest

    return max(sorted({likeliest, *recalled.shares}), key=likely)


class Known:
    """Answers that are worth a guess, each with its end mark."""

    def __init__(self, answers: Iterable[Sequence[int]]) -> None:
        counts = Counter(map(tuple, answers))
        self._root = _Beginning()
        for answer in sorted(counts, key=lambda answer: (-counts[answer], answer)):
            place = self._root
            for token in answer:
                place = place.longer.setdefault(token, _Beginning())
                if len(place.answers) < GUESSES:
                    place.answers.append(answer)

    def guesses(self, written: Sequence[int]) -> list[Sequence[int]]:
        """What the most frequent of those that begin with `written` have after it."""
        place: _Beginning | None = self._root
        for token in written:
            place = place.longer.get(token) if place else None
        return [answer[len(written) :] for answer in place.answers if len(answer) > len(written)] if place else []


@dataclass
class _Beginning:
    """The most frequent of the answers that begin so, and the longer beginnings."""

    answers: list[tuple[int, ...]] = field(default_factory=list)
    longer: dict[int, _Beginning] = field(default_factory=dict)


def write(
    tree: Tree,
    model: PreTrainedModel,
    answers: Sequence[Answer],
    known: Known,
    config: Config,
    end: int,
    pad_id: int,
    stop: Stop | None = None,
) -> None:
    """Write all `answers`, whose prompts `tree` has read, to their ends."""
    for answer in answers:
        answer.walk(tree, end)
    while left := [answer for answer in answers if not answer.ended]:
        if stop is not None:
            stop.check()
        begun = [[*answer.written, answer.next(tree)] for answer in left]
        guesses = [known.guesses(written) for written in begun]
        alone = not any(guesses) and not any(answer.recalled for answer in left)
        if not tree.keeps and alone and max(a.limit - len(a.written) for a in left) > SHORT:
            return _decode(model, left, config, end, pad_id)
        tree.go_on(
            # The last token of a guess, its end mark, is only predicted, never read.
            (answer.path, [[written[-1], *guess[:-1]] for guess in found or [()]])
            for answer, written, found in zip(left, begun, guesses, strict=True)
        )
        for answer in left:
            answer.walk(tree, end)
    return None


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
    end, pad_id = cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id)
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    found = guides(model, tokenizer, prompts, config)

    def one(part: Sequence[int]) -> Sequence[str]:
        recalled = [found[at].recalled for at in part]
        tree = Tree(model, config, pad_id, watched=watched(recalled))
        tree.begin([rows[at] for at in part], [[len(rows[at]) - 1] for at in part])
        answers = [Answer(rows[at], tree.path(rows[at]), limits[at], found[at].recalled) for at in part]
        write(tree, model, answers, Known(()), config, end, pad_id)
        return [text(tokenizer, answer) for answer in answers]

    return routed(model, [guide.expert for guide in found], rows, one, config, advance)


def watched(recalled: Iterable[Recalled | None]) -> set[int]:
    """The tokens that a tree is to watch for what is `recalled`."""
    return {token for one in recalled if one is not None for token in one.tokens}


def text(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> str:
    """What was written, as it is compared."""
    return str(tokenizer.decode(answer.written, skip_special_tokens=True)).strip()


@torch.no_grad()
def _decode(model: PreTrainedModel, answers: Sequence[Answer], config: Config, end: int, pad_id: int) -> None:
    """Write to their ends token by token."""
    lean_output(model)
    inputs = pad([[*a.prompt, *a.written] for a in answers], pad_id, left=True)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with compute(model.device, precision(config)[0]):
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
