"""Text drawn token by token, with a chance of its own for each text: the same for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from treering.stop import Stop
    from treering.tree import Path, Tree

COLDEST = 1e-5
"""Below this temperature the likeliest token has all the probability that numbers can tell."""


def probabilities(scores: Tensor, temperature: float, top_p: float) -> Tensor:
    """Softmax of `scores` `[vocabulary]`, cut to the smallest set of tokens that holds `top_p` of it; not normalised.

    (Nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751.)
    """
    found = ((scores - scores.max()) / temperature).softmax(-1)
    if top_p >= 1:
        return found
    ordered, ids = found.sort(descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    beyond[0] = False  # Whatever `top_p` is, the likeliest stays.
    return found.index_fill(0, ids[beyond], 0.0)


@dataclass
class _Text:
    """One on its way: its chance, its path in the tree, the logits after that, and what was written."""

    chance: torch.Generator
    path: Path
    after: Tensor
    written: list[int] = field(default_factory=list)
    ended: bool = False

    def choose(self, temperature: float, top_p: float) -> int:
        if temperature < COLDEST:
            return int(self.after.argmax())
        return int(torch.multinomial(probabilities(self.after, temperature, top_p), 1, generator=self.chance))


def draw(
    tree: Tree,
    beginning: Sequence[int],
    seeds: Sequence[str],
    end: int,
    limit: int,
    temperature: float,
    top_p: float,
    stop: Stop | None = None,
) -> list[list[int] | None]:
    """For each seed the tokens that follow the token ids `beginning`, up to the token `end`, in an empty `tree`.

    None: `end` did not come within `limit` tokens. Raises `UpdateInterruptedError` when `stop` was asked.
    """
    [after] = tree.begin([beginning], [[len(beginning) - 1]]).cpu()
    texts = [_Text(torch.Generator().manual_seed(_number(seed)), tree.path(beginning), after) for seed in seeds]
    for place in range(limit + 1):
        left = [text for text in texts if not text.ended]
        if stop is not None:
            stop.check()
        chosen = [(text, text.choose(temperature, top_p)) for text in left]
        for text, token in chosen:
            text.ended = token == end
        on = [(text, token) for text, token in chosen if not text.ended]
        if not on or place == limit:
            break
        logits = tree.go_on((text.path, [[token]]) for text, token in on)
        for text, token in on:
            at = tree.after(text.path, token)
            assert at is not None  # It was read just now: all texts are as long as each other.
            text.written.append(token)
            text.path = [*text.path, at]
            text.after = logits[at].cpu()
    return [text.written if text.ended else None for text in texts]


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest()) >> 1
