"""Who moves `current` once a second, and knows which version was current when."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from datetime import datetime

from treering import Workspace, registry

SECONDS = 1.0


@dataclass(frozen=True)
class Move:
    """`version` became current at some moment between the two times."""

    version: str
    began: float
    ended: float


class Mover(threading.Thread):
    """Promotes and rolls back, as the commands do, until stopped."""

    def __init__(self, ws: Workspace) -> None:
        super().__init__()
        self.moves = [Move(_current(ws), 0.0, 0.0)]
        self._ws = ws
        self._known = registry.history(ws)
        self._versions = [version.name for version in registry.versions(ws)]
        self._random = random.Random("moves")
        self._ended = threading.Event()

    def run(self) -> None:
        due = time.monotonic()
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            due += SECONDS
            began, here = time.time(), self.moves[-1].version
            if here == "base" or self._random.random() < 0.6:
                self._ws.promote(self._random.choice([name for name in self._versions if name != here]), force=True)
            else:
                self._ws.rollback()
            self.moves.append(Move(_current(self._ws), began, time.time()))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def late(self, version: str, began: float, answered: float) -> float:
        """How many seconds before a request began `version` had ceased to be current; 0 if it was meanwhile.

        Infinity if it became so only after the request was answered.
        """
        ends = [move.ended for move in self.moves[1:]] + [float("inf")]
        spans = [(move.began, end) for move, end in zip(self.moves, ends, strict=True) if move.version == version]
        return min((max(0.0, began - end) for since, end in spans if since <= answered), default=float("inf"))

    def as_the_history_tells(self) -> bool:
        """Whether the history has the same moves, each at its time, which it keeps to the second."""
        noted = registry.history(self._ws)[len(self._known) :]
        times = [datetime.fromisoformat(note["time"]).timestamp() for note in noted]
        return [note["version"] or "base" for note in noted] == [move.version for move in self.moves[1:]] and all(
            int(move.began) <= time <= move.ended for move, time in zip(self.moves[1:], times, strict=True)
        )


def _current(ws: Workspace) -> str:
    here = registry.current(ws)
    return here.name if here else "base"
