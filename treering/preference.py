"""Preference pairs: the chosen answer is to become likelier than the rejected one, beside what the update began with.

Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290), the sigmoid loss that TRL and LLaMA-Factory
take by default. The reference is the model before the first step (the parent, or the base model). It is asked once,
and of what it says one number a pair is kept, so that no second model is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from treering.model import Tokens


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch: in `Batch.targets` the answer tokens of each one's `chosen` and `rejected` answer.

    Both are spans, `(start, end)`. `margins` `[pairs]`: by how much the reference finds the chosen answer likelier, in
    nats; `of` is how many pairs the whole optimiser step has.
    """

    chosen: Sequence[tuple[int, int]]
    rejected: Sequence[tuple[int, int]]
    margins: Tensor
    of: int


def with_rejected(rows: Sequence[Tokens]) -> list[Tokens]:
    """The rows, and behind them the rejected answers of those that are pairs."""
    return [*rows, *(row.rejected for row in rows if row.rejected is not None)]


def pairs_of(rows: Sequence[Tokens], device: torch.device | str) -> Pairs | None:
    """Where they are in a batch of `with_rejected(rows)`; None: there are none."""
    spans, start = list[tuple[int, int]](), 0
    for row in with_rejected(rows):
        spans.append((start, start + len(row.answers)))
        start += len(row.answers) + len(row.prompts)
    places = [place for place, row in enumerate(rows) if row.rejected is not None]
    if not places:
        return None
    margins = torch.tensor([rows[place].margin for place in places], device=device)
    return Pairs([spans[place] for place in places], spans[len(rows) :], margins, len(places))


def loss(pairs: Pairs, logits: Tensor, targets: Tensor, beta: float) -> Tensor:
    """What the batch adds to the mean of `-log sigmoid(beta * (margin of the model - that of the reference))`."""
    each = -cross_entropy(logits, targets, reduction="none")
    chosen, rejected = (
        torch.stack([each[start:end].sum() for start, end in spans]) for spans in (pairs.chosen, pairs.rejected)
    )
    return -logsigmoid(beta * (chosen - rejected - pairs.margins)).sum() / pairs.of
