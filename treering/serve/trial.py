"""The version on trial, in a running server: which requests it answers, what came of them, and when that is written."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from treering import canary, figures
from treering.canary import Canary, Mode
from treering.errors import TreeringError
from treering.figures import Arm, Line
from treering.files import Watched
from treering.serve.engine import EngineError
from treering.serve.shadow import Asked, Outcome, Shadows

if TYPE_CHECKING:
    from treering.sections import ServeConfig
    from treering.serve.engine import Engine, Job
    from treering.serve.limits import Limits
    from treering.serve.telemetry import Seen
    from treering.workspace import Workspace

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_A_LINE = 60.0

MANY_KEYS = 20
"""So many keys stand for users. Fewer are services with many users behind: one of them may be all the traffic."""

log = logging.getLogger("treering.serve")


@dataclass
class Part:
    """A request's part in a trial."""

    version: str
    """The version on trial."""
    mode: Mode
    arm: Arm
    failed: bool = False
    """The version on trial cannot answer, and current does."""
    jobs: list[Job] = field(default_factory=list)
    """What current was asked, for the shadow."""


class Trial:
    """Follows `canary.json`. Whatever goes wrong here, users are answered by current, and `problem` says what it is."""

    def __init__(
        self,
        ws: Workspace,
        engine: Engine,
        limits: Limits,
        settings: ServeConfig,
        counted: Callable[[Arm, Outcome], None],
    ) -> None:
        self._ws = ws
        self._engine = engine
        self._counted = counted
        self._shadows = Shadows(engine, limits, settings)
        self._watched = Watched(ws.root / canary.FILE, lambda: canary.running(ws.root))
        self._running: Canary | None = None
        self._damage = ""
        self._refusal = ""
        self._lines: dict[tuple[str, Mode, Arm, str], Line] = {}
        self._unwritten: list[Line] = []
        self._written = time.monotonic()

    @property
    def problem(self) -> str:
        """Why no version is on trial although one should be."""
        return self._damage or self._refusal

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    async def look(self) -> None:
        """Do as the file says now; write what was counted, if a trial ended or it is time."""
        damage, wanted = "", None
        try:
            wanted = self._watched.now()
        except (TreeringError, OSError) as error:
            damage = str(error)
            if damage != self._damage:
                log.error("%s", damage)
        self._damage = damage
        if wanted != self._running:
            self._running, self._refusal = None, ""
            await self.write()
            if wanted is not None:
                await self._begin(wanted)
        elif time.monotonic() - self._written >= SECONDS_A_LINE:
            await self.write()

    def part(
        self, model: str, serving: str, user: str | None = None, key: str | None = None, keys: int = 0
    ) -> Part | None:
        """Which part a request for `model` has, if any. `serving` answers to `current`; `keys`: how many there are.

        One user always meets the same version, and so does one key where keys stand for users.
        """
        self._shadows.make_way()
        trial = self._running
        if model != "current" or trial is None or trial.version == serving:
            return None
        if trial.share is None:
            return None if self._refusal else Part(trial.version, trial.mode, "control")
        who = user or (key if keys >= MANY_KEYS else None)
        drawn = place(trial.version, who) if who else random.random()
        if drawn >= trial.share:
            return Part(trial.version, trial.mode, "control")
        return Part(trial.version, trial.mode, "canary", failed=bool(self._refusal))

    def failed(self, part: Part, failure: EngineError) -> None:
        """The version on trial could not answer this request."""
        part.failed = True
        self._note(part.version, failure)

    def ended(self, seen: Seen) -> None:
        """Count a request, unless it was wrong in itself or its client left; then it is the shadow's turn."""
        part = seen.part
        if part is None or (seen.texts is None and seen.status < 500):
            return
        failed = part.failed or seen.status >= 500
        by = part.version if part.arm == "canary" else seen.version or ""
        seconds = time.perf_counter() - seen.started
        self._line(part, part.arm, by).count(seconds, seen.completion_tokens, failed)
        self._counted(part.arm, "failed" if failed else "answered")
        if part.mode == "shadow" and seen.texts is not None:
            self._shadows.ask(part.version, part.jobs, seen.texts, lambda asked: self._shadowed(part, asked))

    async def write(self) -> None:
        """Append what was counted since the last time. What cannot be written now waits for the next."""
        self._written = time.monotonic()
        for line in self._lines.values():
            line.end = _now()
        self._unwritten += self._lines.values()
        self._lines = {}
        while self._unwritten:
            line = self._unwritten.pop(0)
            try:
                await asyncio.to_thread(figures.append, self._ws, line)
            except (TreeringError, OSError) as error:
                self._unwritten.insert(0, line)
                log.error("figures of the canary wait: %s", error)
                return

    async def stop(self) -> None:
        """The server ends: shadows are cut off, and what was counted is written."""
        await self._shadows.stop()
        await self.write()

    async def _begin(self, wanted: Canary) -> None:
        """Answer with it once it is loaded, so that nobody waits for that."""
        try:
            await self._engine.load(wanted.version)
        except EngineError as error:
            self._refuse(wanted.version, error)
        else:
            log.info("%s is on trial (%s)", wanted.version, wanted.mode)
        self._running = wanted

    def _note(self, version: str, failure: EngineError) -> None:
        log.warning("%s, on trial, could not answer: %s", version, failure)
        if failure.code == "version_unavailable":
            self._refuse(version, failure)

    def _refuse(self, version: str, failure: EngineError) -> None:
        """It is not asked again: trying to load it would keep users waiting each time."""
        self._refusal = f"{version} is on trial and cannot answer: {failure}"
        log.error("%s", self._refusal)

    def _shadowed(self, part: Part, asked: Asked) -> None:
        line = self._line(part, "shadow", part.version)
        self._counted("shadow", asked.outcome)
        if asked.outcome == "dropped":
            line.dropped += 1
            return
        line.count(asked.seconds, asked.tokens, asked.outcome == "failed")
        if asked.f1 is not None:
            line.compared += 1
            line.agreed += asked.agreed
            line.f1 += asked.f1
        if asked.failure is not None:
            self._note(part.version, asked.failure)

    def _line(self, part: Part, arm: Arm, by: str) -> Line:
        at = part.version, part.mode, arm, by
        if at not in self._lines:
            self._lines[at] = Line(version=part.version, mode=part.mode, arm=arm, by=by, start=_now(), end=_now())
        return self._lines[at]


def place(version: str, who: str) -> float:
    """Where `who` stands between 0 and 1; for each version somewhere else, so that not always the same users try."""
    return int.from_bytes(hashlib.sha256(f"{version}/{who}".encode()).digest()[:8]) / 2**64


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
