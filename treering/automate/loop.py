"""The loop: look at the inbox, take in what is ready, update if it is time. `Automation.look` reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from treering import registry
from treering.automate import children, culprit, rules
from treering.automate.agenda import Agenda, Work
from treering.automate.events import Events
from treering.automate.hooks import secret
from treering.automate.inbox import Asked, Inbox, wakeups
from treering.automate.state import State, Step
from treering.errors import TreeringError, full_disk_is_clear
from treering.progress import say

if TYPE_CHECKING:
    from treering.sections import AutomateConfig
    from treering.workspace import Workspace

Ended = Literal["asked", "stopped", "idle", "failed"]
"""Why the loop ended: it was asked to; too many failures; with `once` nothing was left to do, or something failed."""

LOOK_AGAIN = 60.0
"""Seconds between two looks when nothing is seen to change."""
STOPPED = 5.0
"""Seconds between two looks for a resume."""
LOCKED = 10.0
"""Seconds before the next try when another process is updating."""
FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
"""Seconds before a failed step is tried again: they grow fourfold with each failure."""


class Automation:
    """Keeps a workspace up to date by itself, one step after the other, each in a process of its own.

    Use it from a thread or a process: `Automation(ws).run(stop, stay=True)` returns once `stop` is set. `clock` and
    `perform` are there for tests.
    """

    def __init__(
        self,
        ws: Workspace,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now().astimezone(),
        perform: Callable[[dict[str, Any], Callable[[], str | None]], children.Answer] = children.run,
    ) -> None:
        self.ws, self.clock, self._perform = ws, clock, perform
        self.events = Events(ws, clock)
        self.inbox, self.agenda = Inbox(ws), Agenda(ws)
        self.state = State()
        self._settings: AutomateConfig | None = None
        self._stop: Asked | None = None
        self._postponed: str | None = None

    def run(self, stop: Asked, *, once: bool = False, stay: bool = False) -> Ended:
        """Go on until `stop` is set, or too many failures in a row stopped it.

        With `once`: until nothing is left to do now. With `stay`: it does not end when stopped, but waits until the
        user resumes. Raises `LockError` if another loop runs, `TreeringError` if it was stopped before (not with
        `stay`), its state is damaged or its settings are wrong.
        """
        with self.ws.lock("watch", "watch"):
            self._begin(once, stay)
            self._stop = stop
            try:
                ended = self._go_on(stop, once, stay)
                self.events.add("automation.ended", self._config(), reason=ended)
                return ended
            finally:
                self.events.hooks.close()

    def _begin(self, once: bool, stay: bool) -> None:
        config = self._settings = self.ws.config().automate
        if config.webhook_secret_file is not None:
            secret(self.ws.root / config.webhook_secret_file)
        self.state = State.load(self.ws.root)
        if self.state.stopped is not None and not stay:
            raise TreeringError(self.state.stopped)
        self.events.add("automation.started", config)
        if self.state.running is not None:
            # Not only a power cut: an update may take the whole machine with it, each time anew.
            self._failed("update", "the loop ended while it ran: it was killed, or the machine went down", config)
        if once:
            self.state.retry_at = None  # Whoever starts it now and then is the one who waits between two tries.

    def _go_on(self, stop: Asked, once: bool, stay: bool) -> Ended:
        next_look = 0.0
        for changed in wakeups(self.ws.inbox, stop):
            if stop.is_set():
                break
            if not changed and time.monotonic() < next_look:
                continue
            before = self.state.failures
            wait, busy = self._guarded_look()
            next_look = time.monotonic() + wait
            if self.state.stopped is not None and not stay:
                return "stopped"
            if once and self.state.failures != before and self.state.retry_at is not None:
                return "failed"
            if once and not busy:
                return "idle"
        return "asked"

    def _guarded_look(self) -> tuple[float, bool]:
        try:
            with full_disk_is_clear(self.ws.root):
                return self.look()
        except (TreeringError, OSError, SQLAlchemyError) as error:
            try:
                self._failed("look", str(error), self._config())
            except OSError:  # A full disk: nothing can be noted either.
                say(str(error))
            return LOOK_AGAIN, False

    def look(self) -> tuple[float, bool]:
        """Do what there is to do now. Returns the seconds after which to look again, and whether there is more."""
        now = self.clock()
        if self.state.stopped is not None:
            self.state = State.load(self.ws.root)
            return STOPPED, False
        if self.state.retry_at is not None and now < self.state.retry_at:
            return (self.state.retry_at - now).total_seconds(), True
        config = self._settings = self.ws.config().automate
        self.state.turn_to(now.astimezone().date())

        found = self.inbox.look(now.timestamp(), config.settle_seconds)
        for file in found.misplaced:
            reason = "put it into a folder named for its task: inbox/<task>/"
            self.events.add("file.ignored", config, file=str(file), reason=reason)
        if found.ready and not self._take_in(found.ready, config):
            return 0.0, True
        work = self.agenda.next(self.state, config, now)
        if self.state.failures.get("look"):
            self._succeeded("look")
        if work is None:
            wait = LOOK_AGAIN if found.growing is None else min(LOOK_AGAIN, found.growing)
            return wait, found.growing is not None
        hold_off = rules.blocked(config, self.state, now)
        if hold_off is not None:
            self._postpone(*hold_off, config)
            return min(LOOK_AGAIN, (hold_off[1] - now).total_seconds()), False
        self._update(work, config)
        return 0.0, True

    def _take_in(self, files: list[Any], config: AutomateConfig) -> bool:
        """Ingest these files; False: it failed or was stopped."""
        answer = self._perform(
            {"step": "ingest", "workspace": str(self.ws.root), "files": [str(file) for file in files]}, self._why_stop
        )
        if answer.error is not None:
            self._not_done("ingest", answer, config)
            return False
        self.inbox.taken(files)
        self._succeeded("ingest")
        counts = {key: answer.value[key] for key in ("rows", "accepted", "duplicates", "quarantined", "held_out")}
        names = [str(file.relative_to(self.inbox.folder)) for file in files]
        self.events.add("rows.ingested", config, files=names, **counts)
        if counts["quarantined"]:
            reasons = ", ".join(f"{rule} {count}" for rule, count in answer.value["reasons"].items())
            self.events.add("rows.quarantined", config, rows=counts["quarantined"], files=names, reason=reasons)
        return True

    def _update(self, work: Work, config: AutomateConfig) -> None:
        """Run one update; written down before and after."""
        state = self.state
        state.running = self.clock()
        state.pending = None if work.file else work.reason
        state.updates += 1
        state.save(self.ws.root)
        self._postponed = None
        self.events.add("update.started", config, reason=work.reason, file=work.file)
        answer = self._perform(
            {"step": "update", "workspace": str(self.ws.root), "file": work.file}, self._meter(config)
        )
        if answer.error is not None:
            self._not_done("update", answer, config)
            return
        if answer.value["status"] == "nothing new":
            state.updates = max(0, state.updates - 1)
        started, state.running, state.pending = state.running, None, None
        if state.scheduled is not None:
            # Not now: a moment of the schedule that came while it ran is for the rows that came while it ran.
            state.scheduled = max(started, state.scheduled)
        self._ended(work, answer.value, config)

    def _ended(self, work: Work, value: dict[str, Any], config: AutomateConfig) -> None:
        """What follows from promoted, held or nothing new."""
        state = self.state
        if work.file is not None:
            state.suspects = state.suspects[1:]
        version = registry.get(self.ws, value["version"]) if value["version"] else None
        refused = None
        if version is not None and value["status"] == "held":
            files = [work.file] if work.file is not None else culprit.files(self.ws, version)
            if not files or not culprit.to_blame(version):
                self.agenda.settle(state)
            elif len(files) == 1:
                refused = files[0], culprit.quarantine(self.ws, files[0], version)
                if not refused[1]:
                    self.agenda.settle(state)
            else:
                state.held, state.suspects = version.name, files
        elif value["status"] == "nothing new" and work.file is None:
            self.agenda.settle(state)
        self._succeeded("update")
        if version is not None:
            event = "update.promoted" if value["status"] == "promoted" else "update.held"
            self.events.add(event, config, version=version.name, reason=value["reason"], file=work.file)
        if refused is not None and version is not None:
            file, rows = refused
            reason = f"held by the gate: {version.summary.removeprefix('held: ')}"
            self.events.add("rows.quarantined", config, rows=rows, files=[file], version=version.name, reason=reason)

    def _not_done(self, step: Step, answer: children.Answer, config: AutomateConfig) -> None:
        """A step that came to no end: stopped as asked, waiting for another process, or failed."""
        state = self.state
        if answer.kind not in ("LockError", "UpdateInterruptedError"):
            self._failed(step, str(answer.error), config)
            return
        if step == "update":
            state.running = None
            state.updates = max(0, state.updates - 1)
        if answer.kind == "LockError":
            state.retry_at = self.clock() + timedelta(seconds=LOCKED)
            say(f"{answer.error}; trying again")
        state.save(self.ws.root)
        if answer.kind == "UpdateInterruptedError" and step == "update":
            self.events.add("update.interrupted", config, reason=answer.error)

    def _failed(self, step: Step, error: str, config: AutomateConfig | None) -> None:
        """Count a failure: wait longer after each, and stop after too many."""
        state, now = self.state, self.clock()
        count = state.failures.get(step, 0) + 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 4 ** (count - 1))
        state.failures = {**state.failures, step: count}
        state.retry_at, state.running = now + timedelta(seconds=pause), None
        if config is not None and count >= config.max_failures:
            state.stopped = (
                f"stopped {now:%Y-%m-%d %H:%M} after {count} failures in a row, the last: {error}. "
                "Mend the cause, then run `treering watch --resume`"
            )
            state.retry_at = None
        state.save(self.ws.root)
        again = state.retry_at.isoformat(timespec="seconds") if state.retry_at else None
        self.events.add(f"{step}.failed", config, reason=error, failures=count, retry_at=again)
        if state.stopped is not None:
            self.events.add("automation.stopped", config, reason=state.stopped)

    def _succeeded(self, step: Step) -> None:
        self.state.failures = {name: count for name, count in self.state.failures.items() if name != step}
        self.state.retry_at = None
        self.state.save(self.ws.root)

    def _postpone(self, reason: str, until: datetime, config: AutomateConfig) -> None:
        if reason != self._postponed:
            self._postponed = reason
            self.events.add("update.postponed", config, reason=reason, until=until.isoformat(timespec="minutes"))

    def _why_stop(self) -> str | None:
        return "asked to stop" if self._stop is not None and self._stop.is_set() else None

    def _meter(self, config: AutomateConfig) -> Callable[[], str | None]:
        """Counts the time of a running update, and says when it has to stop."""
        last = saved = self.clock()

        def why_stop() -> str | None:
            nonlocal last, saved
            now = self.clock()
            self.state.turn_to(now.astimezone().date())
            self.state.seconds += max(0.0, (now - last).total_seconds())
            last = now
            if now - saved >= timedelta(minutes=1):  # A crash forgets no more than that.
                saved = now
                self.state.save(self.ws.root)
            found = rules.blocked(config, self.state, now)
            return self._why_stop() or (found[0] if found else None)

        return why_stop

    def _config(self) -> AutomateConfig | None:
        """The settings as they are, or as they were when they could last be read."""
        with suppress(TreeringError):
            self._settings = self.ws.config().automate
        return self._settings


def resume(ws: Workspace) -> bool:
    """Forget that failures stopped the loop; returns whether they had."""
    state = State.load(ws.root)
    if state.stopped is None:
        return False
    state.stopped, state.retry_at, state.failures = None, None, {}
    state.save(ws.root)
    events = Events(ws, lambda: datetime.now().astimezone())
    events.add("automation.resumed", ws.config().automate)
    events.hooks.close()
    return True
