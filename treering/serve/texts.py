"""Texts to embed, a few at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from treering.errors import no_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from treering.serve.versions import Home


@dataclass
class Texts:
    """The texts of one request: their tokens, and which are left, the longest last."""

    id: str
    version: str
    ids: list[list[int]]
    left: list[int] = field(init=False)
    _taken: list[int] = field(init=False, default_factory=list)
    _under_way: Iterator[Tensor | None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.left = sorted(range(len(self.ids)), key=lambda at: len(self.ids[at]))

    @property
    def begun(self) -> bool:
        """Whether some are half read."""
        return self._under_way is not None

    @property
    def done(self) -> bool:
        """Whether all are embedded."""
        return not self.left and not self.begun

    def go_on(self, home: Home, tokens: int) -> list[dict[str, Any]]:
        """Read on, about `tokens` of them; returns the events of the texts that this brings to their end.

        Where there is no memory for it, what was kept of past answers goes, and the texts under way begin again.
        """
        if self._under_way is None:
            self._taken = self.next(tokens)
            self._under_way = home.batch.embed([self.ids[at] for at in self._taken], home.slot, tokens)
        try:
            vectors = next(self._under_way)
        except Exception as error:
            if not (no_memory(error) and home.batch.forget()):
                raise
            self.left, self._under_way = self.left + self._taken, None
            return []
        if vectors is None:
            return []
        self._under_way = None
        return [
            {"event": "vector", "id": self.id, "at": at, "vector": vector, "tokens": len(self.ids[at])}
            for at, vector in zip(self._taken, vectors.tolist(), strict=True)
        ]

    def next(self, tokens: int) -> list[int]:
        """Takes the longest of those left, and as many more as fit into `tokens` beside it."""
        count = max(1, tokens // len(self.ids[self.left[-1]]))
        taken, self.left = self.left[-count:], self.left[:-count]
        return taken
