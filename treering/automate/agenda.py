"""Which update is due now, if any."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from treering import registry
from treering.automate import rules
from treering.automate.drift import drift

if TYPE_CHECKING:
    from treering.automate.state import State
    from treering.sections import AutomateConfig
    from treering.workspace import Workspace


@dataclass(frozen=True)
class Work:
    """An update to run: why, and with `file` on the rows of that file alone, to see whether it is to blame.

    `row`: the first of those that wait. `careful`: with settings that protect more (`culprit.careful`).
    """

    reason: str
    file: str | None = None
    row: str | None = None
    careful: bool = False


class Agenda:
    """Compares what waits with the settings and with what was tried before."""

    def __init__(self, ws: Workspace) -> None:
        self.ws = ws
        self._drift: tuple[str, float] | None = None

    def next(self, state: State, config: AutomateConfig, now: datetime) -> Work | None:
        """The update that is due, or None. In `state` it notes how far the schedule was followed."""
        if state.suspects and state.forgot:
            again = f"{state.forgot} forgot: once more, with half the rate and more replay"
            return Work(again, state.suspects[0], careful=True)
        if state.suspects:
            return Work(f"{state.held} was held: which of its files is to blame?", state.suspects[0])
        ids = self._waiting()
        what = self._hash(ids)
        idle = not ids or what == state.settled
        since = self._follow(state, config.schedule, now, idle)
        if state.pending_row not in ids:
            state.pending = None
        if idle:
            return None
        if state.pending is not None:
            return Work(state.pending, row=state.pending_row)
        oldest = min(origin.added for origin in self.ws.catalog.origins(ids).values())
        bits = self._drifted(what, ids) if config.drift is not None else None
        reason = rules.due(config, rules.Waiting(len(ids), oldest, bits), now, since)
        return Work(reason, row=ids[0]) if reason else None

    def settle(self, state: State) -> None:
        """Remember what waits now: there is nothing to be had from another update of it."""
        state.settled = self._hash(self._waiting())

    def _waiting(self) -> list[str]:
        """The rows that are to be learned. What a rollback gave back is the user's to say."""
        known = registry.known(self.ws, registry.current(self.ws)) | registry.given_back(self.ws)
        return [id for ids in self.ws.catalog.waiting(known).values() for id in ids]

    def _hash(self, ids: list[str]) -> str:
        here = registry.current(self.ws)
        content = [here.name if here else None, self.ws.config().of_versions(), ids]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _follow(self, state: State, schedule: str | None, now: datetime, idle: bool) -> datetime:
        """The moment up to which the schedule was followed; one that finds nothing to do has had its turn."""
        before = state.scheduled
        if schedule is None:
            state.scheduled = None
        elif before is None or schedule != state.schedule or (idle and rules.next_time(schedule, before) <= now):
            state.scheduled = now
        state.schedule = schedule
        if state.scheduled != before:
            state.save(self.ws.root)
        return state.scheduled or now

    def _drifted(self, what: str, ids: list[str]) -> float:
        if self._drift is None or self._drift[0] != what:
            learned = registry.consumed(self.ws, registry.current(self.ws))
            self._drift = what, drift(self.ws.catalog, ids, sorted(learned))
        return self._drift[1]
