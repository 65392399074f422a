"""What the processes of one training tell each other, so that all of them take the same steps to the same weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, distributed

from treering.errors import TreeringError, UpdateInterruptedError, no_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

WORDS = 300
"""Bytes of an error that the others are told."""

TOGETHER = 2**23
"""Numbers of the gradients that are sent at once: small ones would cost a round trip each, all of them a copy."""

_FINE, _NO_MEMORY, _STOPPED, _FAILED = range(4)  # What counts most comes last.


class Ranks:
    """The processes that train together, `index` of `count`; without others nothing is sent, and nothing changes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.count: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self._device: torch.device = accelerator.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.index == 0

    def own(self, pieces: Sequence[T]) -> Sequence[T]:
        """Those of a step's pieces that are computed here."""
        return pieces[self.index :: self.count]

    def begin(self, seed: int, step: int) -> None:
        """Random numbers of this process's own for `step`, the same however often training is interrupted."""
        if self.count > 1:
            torch.manual_seed(random.Random(f"{seed}:{step}:{self.index}").getrandbits(63))

    def wait(self) -> None:
        """Until all are here."""
        self._told(_FINE, "")

    def any(self, here: bool) -> bool:
        """Whether it is so in one of them."""
        return any(outcome for outcome, _ in self._told(int(here), ""))

    def agreed(self, work: Callable[[], T]) -> T:
        """What `work` makes here, once it has come to its end everywhere.

        Raises what it raised; where it failed in another process, the like of that: `UpdateInterruptedError` for a
        stop, `MemoryError`, or `TreeringError` for anything else.
        """
        if self.count == 1:
            return work()
        outcome, words = _FINE, ""
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(work())
        except UpdateInterruptedError as error:
            outcome, words = _STOPPED, str(error)
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            if no_memory(error):  # Not kept: it would hold the pass that failed, and all its memory.
                outcome = _NO_MEMORY
            else:
                outcome, failure = _FAILED, error
        found = self._told(outcome, words)
        worst = max(range(self.count), key=lambda rank: found[rank][0])
        outcome, words = found[worst]
        if outcome == _STOPPED:
            raise UpdateInterruptedError(words)
        if outcome == _NO_MEMORY:
            raise MemoryError(words)
        if outcome == _FAILED:
            raise failure or TreeringError(f"process {worst + 1} of the {self.count} that train failed: {words}")
        return result[0]

    def summed(
        self, losses: Mapping[str, float], names: Sequence[str], parameters: Sequence[Tensor]
    ) -> dict[str, float]:
        """The losses (some of `names`) and, in place, the gradients of all processes, added up in the same order."""
        if self.count == 1:
            return dict(losses)
        said = [(losses.get(name, 0.0), float(name in losses)) for name in names]
        used = [(0.0, float(parameter.grad is not None)) for parameter in parameters]
        sums = torch.tensor([*said, *used], dtype=torch.float64, device=self._device)
        self._add_up(sums)
        values, counts = sums.cpu().unbind(1)
        learning = [p for p, count in zip(parameters, counts[len(names) :], strict=True) if count]
        for group in _groups(learning):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._add_up(flat)
            sizes = [gradient.numel() for gradient in gradients]
            for parameter, gradient, total in zip(group, gradients, flat.split(sizes), strict=True):
                parameter.grad = gradient.copy_(total.view_as(gradient))
        return {name: float(values[at]) for at, name in enumerate(names) if counts[at]}

    def _add_up(self, numbers: Tensor) -> None:
        """In place, over all processes."""
        with _unless_one_is_gone():
            distributed.all_reduce(numbers)

    def _told(self, outcome: int, words: str) -> list[tuple[int, str]]:
        """What each process has to say, in their order; it waits for all of them."""
        if self.count == 1:
            return [(outcome, words)]
        text = words.encode()[:WORDS].ljust(WORDS)
        own = torch.tensor([outcome, *text], dtype=torch.uint8, device=self._device)
        found = [torch.empty_like(own) for _ in range(self.count)]
        with _unless_one_is_gone():
            distributed.all_gather(found, own)
        said = [bytes(each.tolist()) for each in found]
        return [(each[0], each[1:].decode(errors="ignore").strip()) for each in said]


@contextmanager
def _unless_one_is_gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TreeringError(
            f"the processes that train lost each other ({str(error).splitlines()[0]}); the checkpoint is kept: run "
            "`treering update` again to resume"
        ) from error


def _groups(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one kind, with no more than `TOGETHER` numbers where they are more than one."""
    group: list[Tensor] = []
    for parameter in parameters:
        size = sum(p.numel() for p in group) + parameter.numel()
        if group and (size > TOGETHER or parameter.dtype != group[0].dtype):
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group
