"""Forward passes over many rows, with nothing learned: those of like length together, all threads at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from treering import shares
from treering.errors import first_line, no_memory
from treering.model import Tokens
from treering.progress import Advance, silent
from treering.readings import Reading, Readings
from treering.room import give_back
from treering.tree import Tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.stop import Stop

R = TypeVar("R")

TOKENS = 2048
"""Tokens that a part has at most, unless one row alone has more: memory grows with them."""

ALIKE = 16
"""Rows whose lengths differ by less go together whatever they are, so that rows that begin alike can."""


def read(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    make: Callable[[Sequence[Tokens], Tensor], Sequence[R]],
    config: Config,
    pad_id: int,
    advance: Advance,
    stop: Stop | None = None,
    reading: Reading | None = None,
) -> list[R]:
    """What `make` makes of some rows and the logits of all their answer tokens: a result a row, in order.

    Raises as `in_parts` does.
    """

    def one(part: Sequence[int]) -> Sequence[R]:
        now = [rows[at] for at in part]
        return make(now, read_answers(Tree(model, config, pad_id, keep=False), now))

    return in_parts(model, [row.ids for row in rows], one, config, advance, stop, reading)


def read_answers(tree: Tree, rows: Sequence[Tokens]) -> Tensor:
    """Float32 logits `[answer tokens, vocabulary]` that predict the answer tokens of `rows`, in a tree's first pass.

    The last token of a row is only predicted, never read.
    """
    return tree.begin([row.ids[:-1] for row in rows], [[place - 1 for place in row.answers] for row in rows])


def in_parts(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[R]],
    config: Config,
    advance: Advance,
    stop: Stop | None = None,
    reading: Reading | None = None,
) -> list[R]:
    """What `work` makes of parts of `rows` (token ids), given by their places: a result a row, in order of the rows.

    Where memory runs out, the part is taken again in halves and all after it as well; `reading` remembers.

    Raises:
        UpdateInterruptedError: `stop` was asked.
        TreeringError: there is no memory for one row.
    """
    reading = reading or Readings(None).of("reading rows")
    # Quantised layers keep notes of the pass they are in.
    at_once = torch.get_num_threads() if model.device.type == "cpu" and not config.quantization_bit else 1

    def unless_stopped(part: Sequence[int]) -> Sequence[R]:
        if stop is not None:
            stop.check()
        return work(part)

    found: dict[int, R] = {}
    parts, done = reading.known(cut(rows, config.eval.batch_size, at_once)), 0
    while done < len(parts):
        short = ""
        try:
            with shares.side_by_side(at_once) as compute_all:
                for results in compute_all(unless_stopped, parts[done:]):
                    found.update(zip(parts[done], results, strict=True))
                    advance(len(parts[done]))
                    done += 1
        except Exception as error:
            if not no_memory(error):
                raise
            short = first_line(error)
            give_back(error)
        if short:
            parts = reading.halve(parts, done, at_once, short)
    return [found[at] for at in range(len(rows))]


def cut(rows: Sequence[Sequence[int]], size: int, at_once: int) -> list[list[int]]:
    """Places of `rows` (token ids) in parts of at most `size` rows and `TOKENS` tokens, about as long as each other.

    Where `at_once` are worked on at a time, there are as many parts or a multiple, so that none waits for the last.
    """
    order = sorted(range(len(rows)), key=lambda at: (len(rows[at]) // ALIKE, rows[at]))
    left = sum(map(len, rows))
    rounds = max(-(-len(rows) // (size * at_once)), -(-left // (TOKENS * at_once)))
    parts: list[list[int]] = []
    room = 0.0
    for at in order:
        length = len(rows[at])
        if not parts or len(parts[-1]) == size or room < length / 2:
            parts.append([])
            room = min(TOKENS, left / max(1, rounds * at_once - len(parts) + 1))
        parts[-1].append(at)
        room -= length
        left -= length
    return parts


def losses(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    config: Config,
    pad_id: int,
    stop: Stop | None = None,
    reading: Reading | None = None,
    advance: Advance = silent,
) -> list[float]:
    """The cross entropy of each row, the mean over its answer tokens in nats; `model` stays in the mode it is in.

    Raises as `in_parts` does.
    """
    training = model.training
    model.eval()
    try:
        return read(model, rows, _row_losses, config, pad_id, advance, stop, reading)
    finally:
        model.train(training)


def _row_losses(rows: Sequence[Tokens], logits: Tensor) -> list[float]:
    targets = torch.tensor([row.ids[place] for row in rows for place in row.answers], device=logits.device)
    found = cross_entropy(logits, targets, reduction="none").split([len(row.answers) for row in rows])
    return [loss.mean().item() for loss in found]
