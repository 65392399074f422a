"""How much is let in: answers at once, and requests a minute of each key."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from treering.serve.errors import ApiError

RETRY_SECONDS = 1
WINDOW_SECONDS = 60.0


class TooManyError(ApiError):
    """A limit was met."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, status=429, code="rate_limit_exceeded", retry_after=retry_after)


class Limits:
    """Counts what is under way and what each key asked within the last minute."""

    def __init__(self, room: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.inside = 0
        self._room = room
        self._clock = clock
        self._asked: dict[str | None, deque[float]] = {}

    @contextmanager
    def entered(self, answers: int) -> Iterator[None]:
        """Hold room for `answers`. Raises `TooManyError` if there is not enough now, `ApiError` if there never is."""
        if answers > self._room:
            raise ApiError(
                f"{answers} answers are more than the {self._room} that there is room for (serve.max_batch_size and "
                "serve.max_queue); ask for fewer at once",
                status=400,
                code="too_many_answers",
            )
        if self.inside + answers > self._room:
            raise TooManyError(
                f"{self.inside} answers are under way or wait, and {self._room} is the most; try again later",
                RETRY_SECONDS,
            )
        self.inside += answers
        try:
            yield
        finally:
            self.inside -= answers

    def ask(self, key: str | None, per_minute: int) -> None:
        """Count a request of `key`, or of all who have none. Raises `TooManyError` beyond `per_minute` in a minute."""
        now = self._clock()
        asked = self._asked.setdefault(key, deque())
        while asked and now - asked[0] >= WINDOW_SECONDS:
            asked.popleft()
        if len(asked) >= per_minute:
            wait = int(WINDOW_SECONDS - (now - asked[0])) + 1
            who = "this key" if key else "all without a key together"
            raise TooManyError(f"{who} may ask {per_minute} times a minute; try again in {wait} s", wait)
        asked.append(now)
