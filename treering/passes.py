"""Forward passes over many rows, with nothing learned: those of like length together, all threads at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from treering import shares
from treering.batches import Batch, make_batch
from treering.model import Tokens, compute, logits_at, use_bf16
from treering.progress import Advance, bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.stop import Stop

R = TypeVar("R")


def read(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    make: Callable[[Batch, Tensor], Sequence[R]],
    config: Config,
    pad_id: int,
    advance: Advance,
    stop: Stop | None = None,
) -> list[R]:
    """What `make` makes of each batch and its logits (`logits_at` of its answer tokens): a result a row, in order.

    Raises `UpdateInterruptedError` when `stop` was asked.
    """
    order = sorted(range(len(rows)), key=lambda at: (len(rows[at].ids), rows[at].id))
    size, bf16 = config.eval.batch_size, use_bf16(config)[0]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    # Quantised layers keep notes of the pass they are in.
    at_once = torch.get_num_threads() if model.device.type == "cpu" and not config.quantization_bit else 1
    found: dict[int, R] = {}

    @torch.no_grad()
    def one(batch: Sequence[int]) -> Sequence[R]:
        made = make_batch([rows[at] for at in batch], pad_id, model.device)
        with compute(bf16, model.device):
            logits = logits_at(model, **made.inputs, at=made.at)
        return make(made, logits)

    with shares.side_by_side(at_once) as compute_all:
        for start in range(0, len(batches), at_once):
            if stop is not None:
                stop.check()
            now = batches[start : start + at_once]
            for batch, results in zip(now, compute_all(one, now), strict=True):
                found.update(zip(batch, results, strict=True))
                advance(len(batch))
    return [found[at] for at in range(len(rows))]


def losses(
    model: PreTrainedModel, rows: Sequence[Tokens], config: Config, pad_id: int, stop: Stop | None = None
) -> list[float]:
    """The cross entropy of each row, the mean over its answer tokens in nats; `model` stays in the mode it is in.

    Raises `UpdateInterruptedError` when `stop` was asked.
    """
    training = model.training
    model.eval()
    try:
        with bar("", len(rows), quiet=True) as advance:
            return read(model, rows, _row_losses, config, pad_id, advance, stop)
    finally:
        model.train(training)


def _row_losses(batch: Batch, logits: Tensor) -> list[float]:
    found = cross_entropy(logits, batch.targets, reduction="none").split(batch.counts)
    return [loss.mean().item() for loss in found]
