"""The same request once more, to a version whose answer nobody gets: compared, and never in a user's way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from treering.scoring import exact_match, token_f1
from treering.serve.engine import EngineError
from treering.serve.respond import together

if TYPE_CHECKING:
    from treering.sections import ServeConfig
    from treering.serve.engine import Engine, Job, Piece
    from treering.serve.limits import Limits

Outcome = Literal["answered", "failed", "dropped"]


@dataclass(frozen=True)
class Asked:
    """How it went. `f1` is None where nothing was compared: answers that were drawn differ by chance."""

    outcome: Outcome
    seconds: float = 0.0
    tokens: int = 0
    agreed: bool = False
    f1: float | None = None
    failure: EngineError | None = None


class Shadows:
    """Asks in the background while users leave half of the batch free; when they come to need it, it is cut off."""

    def __init__(self, engine: Engine, limits: Limits, settings: ServeConfig) -> None:
        self._engine = engine
        self._limits = limits
        self._settings = settings
        self._room = max(1, settings.max_batch_size // 2)
        self._asking: dict[asyncio.Task[None], int] = {}

    def ask(self, version: str, jobs: Sequence[Job], texts: Sequence[str], tell: Callable[[Asked], None]) -> None:
        """Ask `version` what was answered with `texts`; `tell` hears how it went, also if there is no room now."""
        if self._limits.inside + sum(self._asking.values()) + len(jobs) > self._room:
            tell(Asked("dropped"))
            return
        mine = [
            job.model_copy(update={"id": f"{job.id}-shadow", "version": version, "background": True, "whole": True})
            for job in jobs
        ]
        task = asyncio.create_task(self._ask(mine, texts, tell))
        self._asking[task] = len(jobs)

        def over(task: asyncio.Task[None]) -> None:
            del self._asking[task]
            if task.cancelled():
                tell(Asked("dropped"))

        task.add_done_callback(over)

    def make_way(self) -> None:
        """A user's request comes: once users need more than half of the batch, all of it is theirs."""
        if self._limits.inside >= self._room:
            for task in self._asking:
                task.cancel()

    async def stop(self) -> None:
        """Cut all off."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _ask(self, jobs: Sequence[Job], texts: Sequence[str], tell: Callable[[Asked], None]) -> None:
        started = time.perf_counter()
        answers: list[list[Piece]] = [[] for _ in jobs]
        failure: EngineError | None = None
        try:
            async with asyncio.timeout(self._settings.request_timeout):
                async for index, piece in together(self._engine, list(jobs)):
                    answers[index].append(piece)
        except TimeoutError:
            failure = EngineError("it took too long", status=504, code="timeout")
        except EngineError as error:
            failure = error
        seconds = time.perf_counter() - started
        if failure is not None:
            tell(Asked("failed", seconds, failure=failure))
            return
        tokens = sum(pieces[-1].completion_tokens for pieces in answers)
        if any(self._drawn(job) for job in jobs):
            tell(Asked("answered", seconds, tokens))
            return
        pairs = [("".join(p.text for p in pieces), text) for pieces, text in zip(answers, texts, strict=True)]
        f1 = sum(token_f1(mine, sent) for mine, sent in pairs) / len(pairs)
        agreed = all(exact_match(mine, sent) == 1 for mine, sent in pairs)
        tell(Asked("answered", seconds, tokens, agreed, f1))

    def _drawn(self, job: Job) -> bool:
        temperature = self._settings.temperature if job.temperature is None else job.temperature
        return temperature > 0 and job.seed is None
