"""A user who asks all along, and remembers what became of each question."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import openai

PAUSE = 0.25


@dataclass(frozen=True)
class Asked:
    """One request, by the clock: which version answered, or the error."""

    began: float
    ended: float
    version: str = ""
    error: str = ""


class Client(threading.Thread):
    """Asks what `question` returns, one request after the other, until stopped."""

    def __init__(self, url: str, question: Callable[[], str]) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self._question = question
        self._openai = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)
        self._stop_asking = threading.Event()
        self._died: Exception | None = None

    def run(self) -> None:
        try:
            self._ask_on()
        except Exception as error:
            self._died = error

    def _ask_on(self) -> None:
        while not self._stop_asking.wait(PAUSE):
            began = time.time()
            try:
                answer = ask(self._openai, "current", self._question())
                self.asked.append(Asked(began, time.time(), version=answer.system_fingerprint))
            except openai.OpenAIError as error:
                self.asked.append(Asked(began, time.time(), error=repr(error)))

    def stop(self) -> None:
        """Raises what ended it before, so that it never is silent for want of a question."""
        self._stop_asking.set()
        self.join()
        if self._died is not None:
            raise self._died


def ask(client: openai.OpenAI, model: str, text: str) -> Any:
    """One question, with room for a desk's name."""
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], max_tokens=12)


def unanswered(asked: Sequence[Asked], down: Sequence[tuple[float, float]]) -> list[Asked]:
    """The requests that failed although the server was up for all of their time."""
    return [a for a in asked if a.error and not any(a.began <= until and a.ended >= since for since, until in down)]


def longest_gap(asked: Sequence[Asked], down: Sequence[tuple[float, float]]) -> float:
    """For how many seconds at most no answer came, times at which the server was down aside."""
    ends = [a.ended for a in asked if not a.error]
    return max(until - since for since, until in pairwise(ends) if not any(since <= b and until >= a for a, b in down))


def latest(asked: Sequence[Asked], history: Sequence[dict[str, Any]]) -> float:
    """For how many seconds at most a version answered new requests although another was current (0: it never was).

    Infinity if one answered that was not current yet. `history` is that of the registry, to the second.
    """
    moves = [("base", float("-inf"))]
    moves += [(move["version"] or "base", datetime.fromisoformat(move["time"]).timestamp()) for move in history]
    ends = [time for _, time in moves[1:]] + [float("inf")]
    most = 0.0
    for one in asked:
        if not one.error:
            spans = [(since, end) for (name, since), end in zip(moves, ends, strict=True) if name == one.version]
            most = max(most, min((one.began - end for since, end in spans if since <= one.ended), default=float("inf")))
    return most
