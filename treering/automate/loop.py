"""The loop: look at the inbox, take in what is ready, update if it is time. `Automation.look` reads top to bottom."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy.exc import SQLAlchemyError

from treering import registry
from treering.automate import children, culprit, rules
from treering.automate.agenda import Agenda, Work
from treering.automate.events import Events
from treering.automate.inbox import Asked, Inbox, wakeups
from treering.automate.state import FILE, State, Step
from treering.errors import LockError, TreeringError, full_disk_is_clear
from treering.progress import say

if TYPE_CHECKING:
    from treering.registry import Version
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

    Once it began, whatever goes wrong is counted, told and tried again.
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
        self._at_once = False
        self._begun = False
        self._unsaved = False
        self._failures = 0
        self._postponed: str | None = None

    def run(
        self,
        stop: Asked,
        *,
        once: bool = False,
        stay: bool = False,
        retry: bool = False,
        begun: Callable[[], None] = lambda: None,
    ) -> Ended:
        """Go on until `stop` is set, or too many failures in a row stopped it.

        With `once`: until nothing is left to do now. With `stay`: it does not end when stopped, but waits until the
        user resumes. With `retry`: what failed before is tried at once. Raises `LockError` if another loop runs,
        `ConfigError` if the settings are wrong from the start; `begun` is called once neither can happen any more.
        """
        with self.ws.lock("watch", "watch"):
            self._settings = self.ws.config().automate
            begun()
            # Whoever starts it now and then is the one who waits between two tries.
            self._stop, self._at_once = stop, once or retry
            try:
                self.events.add("automation.started", self._settings)
                ended = self._go_on(stop, once, stay)
                self.events.add("automation.ended", self._config(), reason=ended)
                return ended
            except Exception as error:
                reason = f"{type(error).__name__}: {error}; this is an error in treering: start it again"
                self.events.add("automation.stopped", self._config(), reason=reason)
                raise
            finally:
                self.events.hooks.close()

    def _begin(self) -> None:
        """Read where it stood, and tell what was not told before it ended."""
        config = self.ws.config().automate
        self.state = State.load(self.ws.root)
        self._begun = True
        if self.state.stopped is not None:
            self.events.add("automation.stopped", config, reason=self.state.stopped)
        elif self.state.running is not None:
            self._recover(config)
        if self._at_once:
            self.state.retry_at = None

    def _recover(self, config: AutomateConfig) -> None:
        """What became of the update that ran when the loop ended: a version, or a failure."""
        state = self.state
        version = next((v for v in registry.readable(self.ws) if self._ordered(v)), None)
        if version is None:
            # Not only a power cut: an update may take the whole machine with it, each time anew.
            self._failed("update", "the loop ended while it ran: it was killed, or the machine went down", config)
            return
        file = state.suspects[0] if state.pending is None and state.suspects else None
        was_current = any(move["version"] == version.name for move in registry.history(self.ws))
        value = {"status": "promoted" if was_current else "held", "version": version.name, "reason": version.summary}
        state.running = None
        self._ended(Work(state.pending or "", file, careful=bool(file and state.forgot)), value, config)

    def _ordered(self, version: Version) -> bool:
        """Whether it is of the update that ran: others may have been made by hand since then."""
        moment = version.manifest.get("ordered")
        return moment is not None and datetime.fromisoformat(moment) == self.state.running

    def _go_on(self, stop: Asked, once: bool, stay: bool) -> Ended:
        next_look = 0.0
        for changed in wakeups(self.ws.inbox, stop):
            if stop.is_set():
                break
            if not changed and time.monotonic() < next_look:
                continue
            before = self._failures
            wait, busy = self._guarded_look()
            next_look = time.monotonic() + wait
            if self.state.stopped is not None and not stay:
                return "stopped"
            if once and self._failures > before and self.state.retry_at is not None:
                return "failed"
            if once and not busy:
                return "idle"
        return "asked"

    def _guarded_look(self) -> tuple[float, bool]:
        try:
            with full_disk_is_clear(self.ws.root):
                return self.look()
        except (TreeringError, OSError, SQLAlchemyError) as error:
            self._failed("look", str(error), self._config())
        except Exception as error:
            traceback.print_exc()
            self._failed("look", f"{type(error).__name__}: {error}", self._config())
        return LOOK_AGAIN, False

    def look(self) -> tuple[float, bool]:
        """Do what there is to do now. Returns the seconds after which to look again, and whether there is more."""
        now = self.clock()
        if self.state.stopped is not None:
            self._look_for_a_resume()
            return STOPPED, False
        if self.state.retry_at is not None and now < self.state.retry_at:
            return (self.state.retry_at - now).total_seconds(), True
        if not self._begun:
            self._begin()
            return self.look()
        self.state.retry_at = None
        found = self._do(now)
        if self.state.failures.get("look"):
            self._succeeded("look")
        return found

    def _look_for_a_resume(self) -> None:
        if self._unsaved:  # Else what is on the disk, which does not say that it stopped, would count as a resume.
            self._keep()
            return
        with suppress(TreeringError):
            self.state = State.load(self.ws.root)

    def _do(self, now: datetime) -> tuple[float, bool]:
        config = self._settings = self.ws.config().automate
        self.state.turn_to(now.astimezone().date())

        found = self.inbox.look(now.timestamp(), config.settle_seconds)
        for file, reason in found.ignored.items():
            self.events.add("file.ignored", config, file=file, reason=reason)
        if found.ready and not self._take_in(found.ready, config):
            return 0.0, True
        work = self.agenda.next(self.state, config, now)
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
        counts = {key: count for key, count in answer.value.items() if key != "reasons"}
        names = [str(file.relative_to(self.inbox.folder)) for file in files]
        self.events.add("rows.ingested", config, files=names, **counts)
        if counts["quarantined"]:
            reasons = ", ".join(f"{rule} {count}" for rule, count in answer.value["reasons"].items())
            self.events.add("rows.quarantined", config, rows=counts["quarantined"], files=names, reason=reasons)
        self._succeeded("ingest")
        return True

    def _update(self, work: Work, config: AutomateConfig) -> None:
        """Run one update; written down before and after."""
        state = self.state
        try:
            with self.ws.lock("watch", "update"):
                pass
        except LockError as error:
            state.retry_at = self.clock() + timedelta(seconds=LOCKED)
            self._postpone(str(error), state.retry_at, config)
            return
        state.running = self.clock()
        state.pending, state.pending_row = (None, None) if work.file else (work.reason, work.row)
        state.updates += 1
        state.save(self.ws.root)
        self._postponed = None
        self.events.add("update.started", config, reason=work.reason, file=work.file)
        answer = self._perform(
            {
                "step": "update",
                "workspace": str(self.ws.root),
                "file": work.file,
                "careful": work.careful,
                "ordered": state.running.isoformat(),
            },
            self._meter(config),
        )
        if answer.error is not None:
            self._not_done("update", answer, config)
            return
        if answer.value["status"] == "nothing new":
            state.updates = max(0, state.updates - 1)
        started, state.running = state.running, None
        if state.scheduled is not None:
            # Not now: a moment of the schedule that came while it ran is for the rows that came while it ran.
            state.scheduled = max(started, state.scheduled)
        self._ended(work, answer.value, config)

    def _ended(self, work: Work, value: dict[str, Any], config: AutomateConfig) -> None:
        """What follows from promoted, held or nothing new. Told before it is noted as done: twice rather than never."""
        state = self.state
        state.pending = state.pending_row = None
        version = registry.get(self.ws, value["version"]) if value["version"] else None
        overtaken = version is not None and version.overtaken
        if work.file is not None and not overtaken:
            state.suspects, state.forgot = state.suspects[1:], None
        if version is not None:
            event = "update.promoted" if value["status"] == "promoted" else "update.held"
            self.events.add(event, config, version=version.name, reason=value["reason"], file=work.file)
        if version is not None and value["status"] == "held" and not overtaken:
            files = [work.file] if work.file is not None else culprit.files(self.ws, version)
            if not files or not culprit.to_blame(version):
                self.agenda.settle(state)
            elif len(files) == 1 and not work.careful and culprit.only_forgot(version):
                state.forgot, state.suspects = version.name, [*files, *state.suspects]
            elif len(files) == 1:
                self._quarantine(files[0], version, config)
            else:
                state.held, state.suspects = version.name, files
        elif value["status"] == "nothing new" and work.file is None:
            self.agenda.settle(state)
        self._succeeded("update")

    def _quarantine(self, file: str, version: Version, config: AutomateConfig) -> None:
        """The file is to blame for the hold of `version`."""
        rows = culprit.quarantine(self.ws, file, version)
        reason = f"held by the gate: {version.summary.removeprefix('held: ')}"
        self.events.add("rows.quarantined", config, rows=rows, files=[file], version=version.name, reason=reason)
        if not rows:
            self.agenda.settle(self.state)

    def _not_done(self, step: Step, answer: children.Answer, config: AutomateConfig) -> None:
        """A step that came to no end: stopped as asked, waiting for another process, or failed."""
        state = self.state
        if answer.kind not in ("LockError", "UpdateInterruptedError"):
            self._failed(step, str(answer.error), config)
            return
        if step == "update":
            state.running = None
            state.updates = max(0, state.updates - 1)
        if answer.kind == "LockError":  # Taken since it was seen to be free.
            state.retry_at = self.clock() + timedelta(seconds=LOCKED)
            say(f"{answer.error}; trying again")
        state.save(self.ws.root)
        if answer.kind == "UpdateInterruptedError" and step == "update":
            self.events.add("update.interrupted", config, reason=answer.error)

    def _failed(self, step: Step, error: str, config: AutomateConfig | None) -> None:
        """Count a failure: wait longer after each, and stop after too many."""
        state, now = self.state, self.clock()
        self._failures += 1
        count = state.failures.get(step, 0) + 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 4 ** (count - 1))
        state.failures = {**state.failures, step: count}
        if step == "look" and state.running is not None:
            state.updates = max(0, state.updates - 1)  # It could not even be noted that it starts.
        state.retry_at, state.running = now + timedelta(seconds=pause), None
        if config is not None and count >= config.max_failures:
            state.stopped = (
                f"stopped {now:%Y-%m-%d %H:%M} after {count} failures in a row, the last: {error}. "
                "Mend the cause, then run `treering watch --resume`"
            )
            state.retry_at = None
        again = state.retry_at.isoformat(timespec="seconds") if state.retry_at else None
        self.events.add(f"{step}.failed", config, reason=error, failures=count, retry_at=again)
        if state.stopped is not None:
            self.events.add("automation.stopped", config, reason=state.stopped)
        self._keep()

    def _keep(self) -> None:
        """Write the state down as far as the disk lets it; not before it was read: what is damaged is the user's."""
        if self._begun:
            self._unsaved = True
            try:
                self.state.save(self.ws.root)
            except OSError as error:
                say(f"{self.ws.root / FILE} cannot be written ({error}); it is tried again")
            else:
                self._unsaved = False

    def _succeeded(self, step: Step) -> None:
        self.state.failures = {name: count for name, count in self.state.failures.items() if name != step}
        self.state.save(self.ws.root)

    def _postpone(self, reason: str, until: datetime, config: AutomateConfig) -> None:
        if reason != self._postponed:
            self._postponed = reason
            self.events.add("update.postponed", config, reason=reason, until=until.isoformat(timespec="minutes"))

    def _why_stop(self) -> str | None:
        return "asked to stop" if self._stop is not None and self._stop.is_set() else None

    def _meter(self, config: AutomateConfig) -> Callable[[], str | None]:
        """Counts the time of a running update, and says when it has to stop."""
        last = saved = read = self.clock()

        def why_stop() -> str | None:
            nonlocal config, last, saved, read
            now = self.clock()
            if now - read >= timedelta(seconds=5):
                config, read = self._config() or config, now
            self.state.turn_to(now.astimezone().date())
            self.state.seconds += max(0.0, (now - last).total_seconds())
            last = now
            if now - saved >= timedelta(minutes=1):  # A crash forgets no more than that.
                saved = now
                self._keep()
            found = rules.blocked(config, self.state, now)
            return self._why_stop() or (found[0] if found else None)

        return why_stop

    def _config(self) -> AutomateConfig | None:
        """The settings as they are, or as they were when they could last be read."""
        with suppress(Exception):
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
