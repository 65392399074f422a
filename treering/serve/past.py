"""Texts that were read before: what begins with the same tokens need not read them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import DynamicCache

from treering.serve.cache import made

LIMIT = 4096
"""So many tokens are kept of answers that have ended; of one that has more, none."""


@dataclass(frozen=True)
class Read:
    """`tokens` read with the adapter in `slot`; their keys and values are in row `at` of `cache`, from `start`."""

    tokens: list[int]
    slot: int
    cache: DynamicCache
    at: int = 0
    start: int = 0

    def common(self, tokens: list[int], slot: int) -> int:
        """How many of `tokens` need not be read again; the last is always left, for its logits."""
        if slot != self.slot:
            return 0
        pairs = enumerate(zip(tokens[:-1], self.tokens, strict=False))
        return next((at for at, (a, b) in pairs if a != b), min(len(tokens) - 1, len(self.tokens)))


class Past:
    """What answers that have ended had read and written, oldest first."""

    def __init__(self) -> None:
        self._reads: list[Read] = []

    def __iter__(self) -> Iterator[Read]:
        return iter(self._reads)

    def add(self, read: Read) -> None:
        """Keep a copy of `read`, in place of those it goes on from; the oldest make room."""
        count = len(read.tokens)
        if count > LIMIT:
            return
        columns = slice(read.start, read.start + count)
        own = made(read.cache, lambda tensor: tensor[read.at : read.at + 1, :, columns].clone())
        self.forget(lambda other: other.slot == read.slot and read.tokens[: len(other.tokens)] == other.tokens)
        self._reads.append(Read(read.tokens, read.slot, own))
        while sum(len(other.tokens) for other in self._reads) > LIMIT:
            self._reads.pop(0)

    def forget(self, gone: Callable[[Read], bool]) -> bool:
        """Let go of those that are `gone`; whether there were any."""
        kept = [read for read in self._reads if not gone(read)]
        self._reads, before = kept, len(self._reads)
        return len(kept) < before
