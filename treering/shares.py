"""The batches of a step computed side by side, a thread each.

On a processor the threads of one small product wait for each other more than they work; products of one thread each,
on rows of their own, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

from treering import sharding
from treering.errors import no_memory

if TYPE_CHECKING:
    from treering.config import Config

T = TypeVar("T")
R = TypeVar("R")

LEAST_ROWS = 4
"""Rows that a share has at least, where a batch is full."""

FEW_WEIGHTS = ("lora", "adapter", "norm")
"""What learns so little that each share may have gradients of its own."""


def count(config: Config, device: torch.device) -> int:
    """Into how many shares the rows of a batch are dealt: as many as there are threads, if each has rows enough.

    One where it would cost more than it gains: on an accelerator, and where whole layers learn, for each share has
    gradients of its own. One for dropout as well: threads that draw from the same numbers draw in any order. And one
    for quantised layers, which keep notes of the pass they are in, and weights in shards, which are gathered for it.
    """
    if (
        device.type != "cpu"
        or sharding.asked()
        or config.finetuning_type not in FEW_WEIGHTS
        or config.lora_dropout
        or config.quantization_bit
    ):
        return 1
    return max(1, min(torch.get_num_threads(), config.per_device_train_batch_size // LEAST_ROWS))


def dealt(batch: Sequence[T], parts: int) -> list[Sequence[T]]:
    """The rows of a batch in shares of like length; fewer shares than asked where rows are few."""
    return [batch[start::parts] for start in range(min(parts, len(batch)))]


@contextmanager
def side_by_side(count: int) -> Iterator[Callable[[Callable[[T], R], Sequence[T]], Iterator[R]]]:
    """A `map` that computes `count` at once and keeps the order.

    Where one fails, the others that have begun end before that is raised: what is tried next is alone with the memory.
    """
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads() // count

    def begin() -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)

    def compute_all(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        begun: list[Future[R]] = []
        try:
            for item in items:
                begun.append(pool.submit(work, item))  # Where one cannot begin, those that have are known.
            for computing in begun:
                yield computing.result()
        finally:
            for computing in begun:
                computing.cancel()
            failed = [None if computing.cancelled() else computing.exception() for computing in begun]
            # Each that torch has switched oneDNN off for is to be seen, and what tells of it is asked but once.
            short = [error for error in failed if isinstance(error, Exception) and no_memory(error)]
            if short:
                raise MemoryError(str(short[0])) from short[0]

    with ThreadPoolExecutor(count, initializer=begin) as pool:
        yield compute_all
