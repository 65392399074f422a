"""Which version gave which answer: kept for an hour, so that a thumb counts for the version that it is about."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from treering.serve.errors import ApiError

SECONDS = 3600.0
MOST = 100_000
"""Answers remembered, in some 30 MB; beyond, the oldest go sooner."""


class Answered:
    """Answers by their ids, which nobody can guess: who knows one was given the answer, and may rate it once."""

    def __init__(self, most: int = MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._known: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def note(self, id: str, version: str) -> None:
        """An answer was given."""
        now = self._clock()
        self._known[id] = now, version
        while len(self._known) > self._most or now - next(iter(self._known.values()))[0] > SECONDS:
            self._known.popitem(last=False)

    @contextmanager
    def rating(self, id: str | None) -> Iterator[str]:
        """The version that gave an answer; what fails inside was no thumb. Raises `ApiError` if it can have none."""
        if id is None:
            raise ApiError(
                "a rating needs the `id` of the answer, such as chatcmpl-1f0c9a2e, as `response_id`; "
                "a correction alone needs none",
                status=400,
                code="response_id_missing",
            )
        when, version = self._known.get(id, (float("-inf"), ""))
        if self._clock() - when > SECONDS:
            raise ApiError(
                f"no answer {id!r} is known: its `response_id` is wrong, it was given more than an hour ago, or the "
                "server was restarted since; a correction needs no id",
                status=404,
                code="response_not_found",
            )
        if not version:
            raise ApiError(f"the answer {id!r} has its thumb; the first one stands", status=409, code="already_rated")
        self._known[id] = when, ""
        try:
            yield version
        except BaseException:
            self._known[id] = when, version
            raise
