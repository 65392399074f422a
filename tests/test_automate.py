"""The loop: what it takes in, when it updates, what it does after a hold, a failure and a crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.test_cli import DOCS
from treering import Workspace, gate, overview, registry
from treering.automate import children, culprit, events, inbox, loop
from treering.automate.beside import in_thread
from treering.automate.child import perform
from treering.automate.children import Answer
from treering.automate.loop import Automation
from treering.automate.state import FILE, State
from treering.cli import run
from treering.errors import ConfigError, LockError, TreeringError, VersionError
from treering.gate import Judgement, Verdict
from treering.schedule import LEARNING_RATES
from treering.testing import toy_rows
from treering.train import train

MakeWorkspace = Callable[..., Workspace]
ROOT = Path(__file__).parents[1]
ONE_STEP: dict[str, Any] = {"max_steps": 1, "gate": {"floor": 1.0, "margin": 1.0}, "eval": {"max_new_tokens": 2}}
DEADLINE = 240.0


class Clock:
    """Time as the test sets it: from a noon later than the real time of the moves that the registry notes."""

    def __init__(self) -> None:
        self.now = datetime(2101, 3, 4, 12).astimezone()

    def __call__(self) -> datetime:
        return self.now

    def on(self, **times: float) -> None:
        self.now += timedelta(**times)


class Steps:
    """Performs steps in this process; updates end as `answers` say, as long as it has any."""

    def __init__(self, ws: Workspace) -> None:
        self.ws = ws
        self.orders: list[dict[str, Any]] = []
        self.answers: list[Answer | Callable[[Callable[[], str | None]], Answer]] = []

    def __call__(self, order: dict[str, Any], why_stop: Callable[[], str | None]) -> Answer:
        self.orders.append(order)
        if order["step"] == "update" and self.answers:
            answer = self.answers.pop(0)
            return answer if isinstance(answer, Answer) else answer(why_stop)
        try:
            return Answer(perform(self.ws, order))
        except TreeringError as error:
            return Answer(error=str(error), kind=type(error).__name__)

    @property
    def updates(self) -> list[str | None]:
        """The file of each update that was ordered; None: all that waits."""
        return [Path(o["file"]).name if o["file"] else None for o in self.orders if o["step"] == "update"]


class Rig:
    """A loop whose clock and steps the test holds."""

    def __init__(self, ws: Workspace) -> None:
        self.ws, self.clock, self.steps = ws, Clock(), Steps(ws)
        self.start()

    def start(self) -> None:
        """A new loop on the same workspace, as after a restart."""
        self.loop = Automation(self.ws, clock=self.clock, perform=self.steps)
        self.loop.events.add("automation.started")

    def look(self) -> float:
        return self.loop._guarded_look()[0]

    def until_idle(self) -> None:
        """Look until nothing is left to do, letting files settle, but waiting for nothing else."""
        for _ in range(30):
            wait, busy = self.loop._guarded_look()
            if not busy or wait > 5:
                return
            self.clock.on(seconds=wait)
        raise AssertionError("it never comes to rest")

    def learn(self, *tasks: str) -> None:
        """An update a task."""
        for task in tasks:
            put(self.ws, task)
            self.until_idle()

    @property
    def seen(self) -> list[str]:
        return [entry["event"] for entry in events.history(self.ws)]

    def last(self, event: str) -> dict[str, Any]:
        return [entry for entry in events.history(self.ws) if entry["event"] == event][-1]


@pytest.fixture
def rig(workspace: MakeWorkspace) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**automate: Any) -> Rig:
        made.append(Rig(workspace(automate=automate, **ONE_STEP)))
        return made[-1]

    yield make
    for one in made:  # Whatever happened is told with the keys that are documented.
        DOCS["history"].check({"events": events.history(one.ws)})
        assert set(one.seen) <= {*events.NAMES, "version.promoted", "version.rolled_back"}


def put(ws: Workspace, task: str, name: str = "rows.jsonl", rows: Sequence[object] | None = None) -> Path:
    path = ws.inbox / task / name
    path.parent.mkdir(exist_ok=True)
    lines = toy_rows(task, 20) if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return path


def settings(ws: Workspace, **automate: Any) -> None:
    """Change the settings of the loop."""
    text = (ws.root / "treering.yaml").read_text().partition("automate:")[0]
    (ws.root / "treering.yaml").write_text(text + f"automate: {json.dumps(automate)}\n")


def current(ws: Workspace) -> str | None:
    here = registry.current(ws)
    return here.name if here else None


def waiting(ws: Workspace) -> dict[str, int]:
    found = ws.catalog.waiting(registry.consumed(ws, registry.current(ws)))
    return {task: len(ids) for task, ids in found.items()}


def failed(kind: str = "killed") -> Answer:
    return Answer(error="it broke", kind=kind)


# Files


def test_a_file_counts_once_it_has_stopped_growing(rig: Callable[..., Rig]) -> None:
    auto = rig()
    rows = toy_rows("pens", 20)
    put(auto.ws, "pens", rows=rows[:5])
    assert auto.look() == 5
    for count in (10, 20):
        auto.clock.on(seconds=4)
        put(auto.ws, "pens", rows=rows[:count])
        assert auto.look() == 5
    auto.clock.on(seconds=4)
    assert auto.look() == 1
    assert auto.steps.orders == []
    auto.clock.on(seconds=1)
    auto.look()
    assert [order["step"] for order in auto.steps.orders] == ["ingest", "update"]
    assert auto.last("rows.ingested")["accepted"] == 20
    assert (current(auto.ws), waiting(auto.ws)) == ("v1", {})
    told = [event for event in auto.seen if event != "version.promoted"]  # Its time is the machine's.
    assert told == ["automation.started", "rows.ingested", "update.started", "update.promoted"]


def test_what_was_taken_in_is_not_taken_in_again(rig: Callable[..., Rig]) -> None:
    auto = rig()
    path = put(auto.ws, "pens")
    (auto.ws.inbox / "pens" / "half.jsonl.part").write_text("{")
    auto.until_idle()
    auto.steps.orders.clear()
    auto.start()
    auto.until_idle()
    os.utime(path)
    auto.until_idle()
    assert auto.steps.orders == []
    put(auto.ws, "pens", rows=toy_rows("pens", 30))
    auto.until_idle()
    assert [order["step"] for order in auto.steps.orders] == ["ingest", "update"]


def test_a_file_without_a_task_is_told_once_and_stops_nothing(rig: Callable[..., Rig]) -> None:
    auto = rig()
    (auto.ws.inbox / "lost.jsonl").write_text("{}\n")
    put(auto.ws, "pens")
    auto.until_idle()
    assert current(auto.ws) == "v1"
    assert auto.seen.count("file.ignored") == 1
    assert "inbox/<task>/" in auto.last("file.ignored")["reason"]


def test_bad_rows_are_told(rig: Callable[..., Rig]) -> None:
    auto = rig()
    put(auto.ws, "pens", rows=[*toy_rows("pens", 10), {"odd": 1}])
    auto.until_idle()
    told = auto.last("rows.quarantined")
    assert (told["rows"], told["files"], told["reason"]) == (1, ["pens/rows.jsonl"], "unknown-format 1")


def test_a_file_that_cannot_be_read_is_tried_once(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    auto = rig()

    def refuse(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("treering.data.catalog.sha256", refuse)
    monkeypatch.setattr("treering.data.intake.sha256", refuse)
    put(auto.ws, "pens")
    for _ in range(5):
        auto.until_idle()
    assert [order["step"] for order in auto.steps.orders].count("ingest") == 1


# When


def test_fewer_rows_than_asked_wait(rig: Callable[..., Rig]) -> None:
    auto = rig(min_rows=30)
    put(auto.ws, "pens")
    auto.until_idle()
    assert (waiting(auto.ws), auto.steps.updates) == ({"pens": 18}, [])
    put(auto.ws, "cups")
    auto.until_idle()
    assert auto.steps.updates == [None]
    assert auto.last("update.started")["reason"] == "36 rows wait, at least 30"


def test_the_oldest_row_waits_no_longer_than_asked(rig: Callable[..., Rig]) -> None:
    auto = rig(max_age_hours=2)
    put(auto.ws, "pens")
    auto.clock.now = datetime.now(UTC)
    auto.until_idle()
    assert auto.steps.updates == []
    auto.clock.on(hours=2, minutes=1)
    auto.look()
    assert auto.steps.updates == [None]


def test_drift_starts_an_update(rig: Callable[..., Rig], strict_gate: Callable[[Workspace], None]) -> None:
    auto = rig(drift=0.2)
    strict_gate(auto.ws)  # One step teaches nothing, which the real one can see on so many rows.
    auto.ws.ingest(toy_rows("pens", 200), task="pens")
    auto.look()
    assert auto.last("update.started")["reason"] == "the words drifted by 1.00 bits, more than 0.2"  # Nothing is known.
    more = [{"text": f"pens item {n}: sort b", "label": "pens b"} for n in range(400, 440)]
    auto.ws.ingest(more, task="pens")
    auto.look()
    assert auto.steps.updates == [None]
    other = [{"text": f"which grinder suits espresso number {n}?", "label": "grinder"} for n in range(40)]
    auto.ws.ingest(other, task="coffee")
    auto.look()
    assert auto.steps.updates == [None, None]


def test_a_schedule_is_followed_and_made_up_for(rig: Callable[..., Rig]) -> None:
    auto = rig(schedule="0 2 * * *")
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    auto.look()
    assert auto.steps.updates == []
    auto.clock.on(hours=13, minutes=59)
    auto.look()
    assert auto.steps.updates == []
    auto.clock.on(minutes=1)
    auto.look()
    assert auto.steps.updates == [None]
    # A moment with nothing to do is over; rows that come later wait for the next.
    auto.clock.on(days=1, hours=1)
    auto.look()
    auto.ws.ingest(toy_rows("cups", 20), task="cups")
    auto.look()
    assert auto.steps.updates == [None]
    # The machine was off at two.
    auto.clock.on(days=1)
    auto.start()
    auto.look()
    assert auto.steps.updates == [None, None]


def test_quiet_hours(rig: Callable[..., Rig]) -> None:
    auto = rig(quiet_hours="08:00-18:00")
    put(auto.ws, "pens")
    auto.until_idle()
    auto.until_idle()
    assert auto.steps.updates == []
    assert auto.seen.count("update.postponed") == 1
    assert auto.last("update.postponed")["reason"] == "quiet hours 08:00-18:00"
    assert waiting(auto.ws) == {"pens": 18}  # Taken in all the same.
    auto.clock.on(hours=6)
    auto.look()
    assert auto.steps.updates == [None]


def test_an_update_that_runs_into_quiet_hours_is_stopped_and_resumed(rig: Callable[..., Rig]) -> None:
    auto = rig(quiet_hours="12:30-18:00", updates_per_day=1)

    def long(why_stop: Callable[[], str | None]) -> Answer:
        assert why_stop() is None
        auto.clock.on(minutes=31)
        return Answer(error=why_stop(), kind="UpdateInterruptedError")

    auto.steps.answers = [long]
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    auto.look()
    assert auto.last("update.interrupted")["reason"] == "quiet hours 12:30-18:00"
    auto.look()
    assert auto.steps.updates == [None]
    auto.clock.on(hours=6)
    auto.look()
    assert auto.steps.updates == [None, None]  # It is still the same update: the day's one.
    assert current(auto.ws) == "v1"


def test_the_days_updates_are_counted_across_restarts(rig: Callable[..., Rig]) -> None:
    auto = rig(updates_per_day=2)
    for task in ("pens", "cups", "hats"):
        auto.ws.ingest(toy_rows(task, 20), task=task)
        auto.look()
        auto.start()
    auto.look()
    assert auto.steps.updates == [None, None]
    assert auto.last("update.postponed")["reason"] == "the day's 2 updates are used up"
    auto.clock.on(hours=12)
    auto.look()
    assert auto.steps.updates == [None] * 3
    assert State.load(auto.ws.root).updates == 1


def test_the_days_minutes_are_counted_across_restarts_and_end_an_update(rig: Callable[..., Rig]) -> None:
    auto = rig(minutes_per_day=60)

    def forty(why_stop: Callable[[], str | None]) -> Answer:
        for _ in range(40):
            auto.clock.on(minutes=1)
            asked = why_stop()
            if asked is not None:
                return Answer(error=asked, kind="UpdateInterruptedError")
        return failed("LockError")

    auto.steps.answers = [forty, forty]
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    auto.look()
    auto.start()
    auto.clock.on(minutes=1)
    auto.look()
    assert auto.last("update.interrupted")["reason"] == "the day's 60 minutes are used up"
    assert State.load(auto.ws.root).seconds == 3600
    auto.look()
    assert len(auto.steps.updates) == 2
    auto.clock.on(hours=12)
    auto.look()
    assert len(auto.steps.updates) == 3


def test_another_process_that_updates_is_waited_for(rig: Callable[..., Rig]) -> None:
    auto = rig(max_failures=1)
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    auto.steps.answers = [failed("LockError")] * 3
    for _ in range(3):
        auto.look()
        assert 0 < auto.look() <= loop.LOCKED
        auto.clock.on(seconds=loop.LOCKED)
    auto.look()
    assert len(auto.steps.updates) == 4
    assert (current(auto.ws), auto.loop.state.stopped, auto.loop.state.updates) == ("v1", None, 1)


def test_one_loop_a_workspace(workspace: MakeWorkspace) -> None:
    ws = workspace()
    stop = threading.Event()
    stop.set()
    with ws.lock("watch", "watch"), pytest.raises(LockError, match="in use by `treering watch`"):
        Automation(Workspace(ws.root)).run(stop)


# After a hold


@pytest.fixture
def strict_gate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Workspace], None]:
    """A gate that holds whatever was made of a file with `bad` in its name, and promotes all else."""

    def apply(ws: Workspace) -> None:
        def judge(_: object, __: object, ___: object, fresh: set[str], *____: object) -> Verdict:
            bad = any("bad" in origin.file for origin in ws.catalog.origins(sorted(fresh)).values())
            found = Judgement("pens", "new", 1.0, 0.5 if bad else 1.0, 0, 0, 9, 9, not bad, "measured")
            return Verdict(not bad, "held: pens fell" if bad else "promoted: fine", (found,))

        monkeypatch.setattr(gate, "judge", judge)

    return apply


def test_the_culprit_of_several_files_is_found_and_quarantined(
    rig: Callable[..., Rig], strict_gate: Callable[[Workspace], None]
) -> None:
    auto = rig()
    strict_gate(auto.ws)
    put(auto.ws, "pens", "a.jsonl")
    bad = put(auto.ws, "pens", "bad.jsonl", toy_rows("caps", 20))
    put(auto.ws, "cups", "c.jsonl")
    auto.until_idle()
    assert auto.steps.updates == [None, "c.jsonl", "a.jsonl", "bad.jsonl"]
    versions = registry.versions(auto.ws)
    assert [(v.name, v.parent, v.promote) for v in versions] == [
        ("v1", None, False),
        ("v2", None, True),
        ("v3", "v2", True),
        ("v4", "v3", False),
    ]
    assert (current(auto.ws), waiting(auto.ws)) == ("v3", {})
    # Nothing of the culprit is left to train on or to judge by.
    quarantined = auto.ws.catalog.quarantined()
    assert {(row["file"], row["rule"]) for row in quarantined} == {(str(bad), "held-by-gate")}
    assert len(quarantined) == 20
    assert "v4, which learned this file, was held: pens fell" in quarantined[0]["reason"]
    assert f"treering ingest {bad} --task pens" in quarantined[0]["reason"]
    counts = auto.ws.catalog.counts()
    assert (counts["train"] + counts["held_out"], counts["quarantined"]) == (40, 20)
    told = auto.last("rows.quarantined")
    assert (told["files"], told["rows"], told["version"]) == ([str(bad)], 20, "v4")
    assert State.load(auto.ws.root).suspects == []
    # The held version can still be promoted and built upon.
    auto.ws.promote("v4", force=True)
    put(auto.ws, "hats")
    auto.until_idle()
    assert current(auto.ws) == "v5"


def test_the_only_file_is_the_culprit(rig: Callable[..., Rig], strict_gate: Callable[[Workspace], None]) -> None:
    auto = rig()
    strict_gate(auto.ws)
    bad = put(auto.ws, "pens", "bad.jsonl")
    auto.until_idle()
    auto.until_idle()
    assert auto.steps.updates == [None]
    assert (current(auto.ws), waiting(auto.ws)) == (None, {})
    assert auto.ws.catalog.counts() == {"train": 0, "held_out": 0, "quarantined": 20}

    # Lines added later are new; those refused stay so, and bad lines of the file are told beside them.
    put(auto.ws, "pens", "bad.jsonl", [*toy_rows("pens", 20), {"odd": 1}])
    auto.until_idle()
    assert auto.steps.updates == [None]
    assert auto.ws.catalog.counts() == {"train": 0, "held_out": 0, "quarantined": 21}

    # The user names the file: it is taken back, to the sides it was on, and tried no second time.
    found = auto.ws.ingest(bad, task="pens")
    assert (found.accepted, found.held_out, found.quarantined) == (20, 2, 1)
    assert auto.ws.catalog.counts() == {"train": 18, "held_out": 2, "quarantined": 1}
    auto.until_idle()
    assert len(registry.versions(auto.ws)) == 1
    assert auto.ws.catalog.counts() == {"train": 0, "held_out": 0, "quarantined": 21}


class Forgetful:
    """A gate that holds for what was forgotten: any update of `hard.jsonl`, unless it is a careful one."""

    def __init__(self, ws: Workspace, monkeypatch: pytest.MonkeyPatch, *, ever: bool = True) -> None:
        self.ws, self._ever = ws, ever
        self._rate = LEARNING_RATES["lora"]
        self.rates: list[float] = []

        def noted(*given: Any, **options: Any) -> Any:
            config = given[4]
            self.rates.append(config.learning_rate / self._rate)
            self._careful = config.memory.replay_share > ws.config().memory.replay_share
            return train(*given, **options)

        monkeypatch.setattr("treering.lesson.train", noted)
        monkeypatch.setattr(gate, "judge", self._judge)

    def _judge(self, _: object, __: object, ___: object, fresh: set[str], *____: object) -> Verdict:
        hard = any("hard" in origin.file for origin in self.ws.catalog.origins(sorted(fresh)).values())
        passed = not hard or (self._careful and self._ever)
        found = [
            Judgement("pens", "old", 1.0, 1.0 if passed else 0.5, 0, 0, 9, 9, passed, "measured"),
            Judgement("new data", "new", 0.0, 1.0, 0, 0, 9, 9, True, "measured"),
        ]
        return Verdict(passed, "promoted: fine" if passed else "held: pens fell", tuple(found))


def test_what_only_forgot_is_tried_with_more_protection(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = rig()
    trained = Forgetful(auto.ws, monkeypatch)
    put(auto.ws, "pens", "a.jsonl")
    put(auto.ws, "cups", "hard.jsonl")
    auto.until_idle()
    assert auto.steps.updates == [None, "hard.jsonl", "hard.jsonl", "a.jsonl"]
    assert trained.rates == [1, 1, 0.5, 1]
    assert [v.promote for v in registry.versions(auto.ws)] == [False, False, True, True]
    assert (current(auto.ws), waiting(auto.ws), auto.ws.catalog.quarantined()) == ("v4", {}, [])
    reasons = [entry["reason"] for entry in events.history(auto.ws) if entry["event"] == "update.started"]
    assert reasons[2] == "v2 forgot: once more, with half the rate and more replay"
    assert reasons[3] == "v1 was held: which of its files is to blame?"
    assert State.load(auto.ws.root).forgot is None


@pytest.mark.parametrize(
    ("before", "after", "rows", "passed", "only"),
    [
        (0.0, 1.0, 9, True, True),
        (1.0, 1.0, 9, True, True),
        (1.0, 0.9, 9, True, False),  # Not shown to be wrong is not right.
        (0.0, 0.0, 9, True, False),
        (None, None, 0, True, False),  # Nothing was measured of it.
        (0.0, 0.5, 9, False, False),
    ],
)
def test_only_what_learned_its_rows_only_forgot(
    before: float | None, after: float | None, rows: int, passed: bool, only: bool
) -> None:
    old = Judgement("pens", "old", 1.0, 0.5, 0, 0, 9, 9, False, "fell")
    new = Judgement("new data", "new", before, after, 0, 0, rows, 0, passed, "measured")
    version = SimpleNamespace(manifest={"verdict": Verdict(False, "held", (old, new)).as_dict()})
    assert culprit.only_forgot(cast(Any, version)) == only


def test_what_forgets_however_careful_is_quarantined(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    auto = rig()
    trained = Forgetful(auto.ws, monkeypatch, ever=False)
    hard = put(auto.ws, "cups", "hard.jsonl")
    while not trained.rates:
        auto.clock.on(seconds=max(1, auto.look()))
    assert State.load(auto.ws.root).forgot == "v1"
    auto.steps.answers = [failed()]
    auto.look()
    auto.start()  # A crash forgets nothing of that.
    auto.clock.on(hours=1)
    auto.until_idle()
    assert trained.rates == [1, 0.5]
    assert auto.last("rows.quarantined")["version"] == "v2"
    assert {row["file"] for row in auto.ws.catalog.quarantined()} == {str(hard)}
    assert (current(auto.ws), waiting(auto.ws)) == (None, {})


def test_the_search_goes_on_after_a_crash(rig: Callable[..., Rig], strict_gate: Callable[[Workspace], None]) -> None:
    auto = rig()
    strict_gate(auto.ws)
    put(auto.ws, "pens", "bad.jsonl")
    put(auto.ws, "pens", "c.jsonl", toy_rows("cups", 20))
    while auto.steps.updates != [None]:
        auto.clock.on(seconds=max(1, auto.look()))
    assert len(State.load(auto.ws.root).suspects) == 2
    auto.steps.answers = [failed()]
    auto.look()
    assert auto.steps.updates == [None, "bad.jsonl"]
    auto.start()
    auto.clock.on(minutes=1)
    auto.until_idle()
    assert auto.steps.updates == [None, "bad.jsonl", "bad.jsonl", "c.jsonl"]
    assert (current(auto.ws), waiting(auto.ws)) == ("v3", {})


@pytest.fixture
def moved(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> Rig:
    """v2 is current, hats wait, and while their update runs the user rolls back to v1."""
    auto = rig()
    auto.learn("pens", "cups")
    during_judging(monkeypatch, auto.ws.rollback)
    put(auto.ws, "hats")
    return auto


def during_judging(monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], object]) -> None:
    """Do something while an update runs: one act an update."""
    left, judge = list(acts), gate.judge

    def acting(*args: Any) -> Verdict:
        if left:
            left.pop(0)()
        return judge(*args)

    monkeypatch.setattr(gate, "judge", acting)


def test_what_a_move_overtook_is_learned_on_what_is_current_then(moved: Rig) -> None:
    auto = moved
    auto.until_idle()
    assert auto.last("update.held")["reason"] == "held: its parent v2 is no longer current"
    assert (current(auto.ws), registry.get(auto.ws).parent, waiting(auto.ws)) == ("v4", "v1", {"cups": 18})
    assert (
        set(registry.get(auto.ws).manifest["rows"])
        == set(registry.get(auto.ws).manifest["held_out"]) - {"pens"}
        == {"hats"}
    )
    assert auto.ws.catalog.counts()["quarantined"] == 0


def test_what_there_and_back_overtook_is_learned_after_all(moved: Rig) -> None:
    auto = moved
    while "update.held" not in auto.seen:
        auto.clock.on(seconds=auto.look())
    auto.ws.promote("v2")
    auto.until_idle()
    assert (current(auto.ws), registry.get(auto.ws).parent, waiting(auto.ws)) == ("v4", "v2", {})


def test_rows_held_out_while_they_are_learned_overtake_an_update(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = rig()
    during_judging(monkeypatch, lambda: auto.ws.ingest([], task="pens", held_out=toy_rows("pens", 20)[:4]))
    put(auto.ws, "pens")
    auto.until_idle()
    assert "were held out while it ran" in auto.last("update.held")["reason"]
    assert (current(auto.ws), waiting(auto.ws)) == ("v2", {})


def test_a_suspect_that_was_overtaken_is_tried_again(
    rig: Callable[..., Rig], strict_gate: Callable[[Workspace], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = rig()
    strict_gate(auto.ws)
    put(auto.ws, "pens")
    auto.until_idle()
    put(auto.ws, "cups", "a.jsonl")
    put(auto.ws, "hats", "bad.jsonl")
    during_judging(monkeypatch, lambda: None, auto.ws.rollback)
    auto.until_idle()
    assert auto.steps.updates == [None, None, "a.jsonl", "a.jsonl", "bad.jsonl"]
    assert (current(auto.ws), registry.get(auto.ws).parent, waiting(auto.ws)) == ("v4", None, {"pens": 18})


def test_what_the_user_rolled_back_is_not_learned_again_by_itself(rig: Callable[..., Rig]) -> None:
    auto = rig()
    auto.learn("pens", "cups")
    assert current(auto.ws) == "v2"
    auto.ws.rollback()
    auto.until_idle()
    settings(auto.ws, min_rows=1)
    auto.until_idle()
    assert (current(auto.ws), waiting(auto.ws), len(registry.versions(auto.ws))) == ("v1", {"cups": 18}, 2)
    assert auto.ws.catalog.counts()["quarantined"] == 0
    assert "version.rolled_back" in auto.seen
    put(auto.ws, "hats")
    put(auto.ws, "cups", "more.jsonl", [{"text": f"another cup {n}", "label": "cups a"} for n in range(20)])
    auto.until_idle()
    assert (current(auto.ws), waiting(auto.ws)) == ("v3", {"cups": 18})
    assert overview.status(auto.ws)["rolled_back"] == {"cups": 18}
    version = registry.get(auto.ws)
    assert {task: len(ids) for task, ids in version.manifest["rows"].items()} == {"cups": 18, "hats": 18}
    assert {task: len(ids) for task, ids in version.manifest["held_out"].items()} == {"cups": 2, "hats": 2, "pens": 2}
    auto.ws.update()
    assert (current(auto.ws), waiting(auto.ws)) == ("v4", {})


def test_what_was_rolled_back_stays_so_when_its_folder_is_gone(rig: Callable[..., Rig]) -> None:
    auto = rig()
    auto.learn("pens", "cups")
    auto.ws.rollback()
    shutil.rmtree(auto.ws.versions / "v2")
    auto.until_idle()
    assert "look.failed" not in auto.seen
    assert (current(auto.ws), waiting(auto.ws)) == ("v1", {"cups": 18})
    assert overview.status(auto.ws)["rolled_back"] == {"cups": 18}
    auto.learn("hats")
    assert (current(auto.ws), waiting(auto.ws)) == ("v3", {"cups": 18})
    # Who updates by hand wants them; rolled back once more, they are left alone again.
    auto.ws.update()
    assert (current(auto.ws), waiting(auto.ws)) == ("v4", {})
    assert overview.status(auto.ws)["rolled_back"] == {}
    auto.ws.rollback()
    shutil.rmtree(auto.ws.versions / "v4")
    auto.until_idle()
    assert (current(auto.ws), waiting(auto.ws)) == ("v3", {"cups": 18})


@pytest.mark.parametrize("once_current", [True, False])
def test_a_damaged_version_that_current_does_not_come_from_stops_nothing(
    rig: Callable[..., Rig], capsys: pytest.CaptureFixture[str], once_current: bool
) -> None:
    auto = rig()
    auto.learn("pens")
    auto.ws.ingest(toy_rows("cups", 20), task="cups")
    auto.ws.update(*() if once_current else ["gate.min_gain=1"])
    if once_current:
        auto.ws.rollback()
    manifest = auto.ws.versions / "v2" / "manifest.json"
    with manifest.open("a") as file:
        file.write("x\n")
    back = {"cups": 18} if once_current else {}
    capsys.readouterr()
    auto.learn("hats")
    told = capsys.readouterr().err
    assert told.count("is passed over") == 1
    assert f"or remove {manifest.parent}. " in told and "`treering verify` names all" in told
    assert "look.failed" not in auto.seen and "ingest.failed" not in auto.seen and "update.failed" not in auto.seen
    assert (registry.get(auto.ws).number >= 3, waiting(auto.ws)) == (True, back)
    assert overview.status(auto.ws)["rolled_back"] == back
    names = [version.name for version in registry.versions(auto.ws)]
    assert {v["name"] for v in overview.list_versions(auto.ws)["versions"]} == {*names} - {"v2"}
    assert [text[:4] for text in overview.verify(auto.ws)["problems"]] == ["v2: "]
    # By hand, too, whether it is still there or was removed as told.
    auto.ws.ingest(toy_rows("mugs", 20), task="mugs")
    by_hand = Workspace(auto.ws.root).update()
    assert by_hand is not None
    assert {task: len(ids) for task, ids in by_hand.manifest["rows"].items()} == {**back, "mugs": 18}
    shutil.rmtree(manifest.parent)
    auto.learn("caps")
    assert (registry.get(auto.ws).parent, waiting(auto.ws)) == (by_hand.name, {})


def test_a_damaged_version_that_current_comes_from_is_refused(rig: Callable[..., Rig]) -> None:
    auto = rig()
    auto.learn("pens", "cups")
    (auto.ws.versions / "v1" / "manifest.json").write_text("{")
    put(auto.ws, "hats")
    auto.until_idle()
    assert "v1: " in auto.last("look.failed")["reason"]
    for act in (auto.ws.update, auto.ws.ingest):
        with pytest.raises(VersionError, match=r"v1: .*manifest\.json cannot be read"):
            act()
    assert [version.name for version in registry.versions(auto.ws)] == ["v1", "v2"]


def test_quiet_hours_that_begin_to_be_set_hold_for_the_update_that_runs(rig: Callable[..., Rig]) -> None:
    auto = rig()
    auto.ws.ingest(toy_rows("pens", 20), task="pens")

    def long(why_stop: Callable[[], str | None]) -> Answer:
        assert why_stop() is None
        settings(auto.ws, quiet_hours="11:00-13:00")
        auto.clock.on(seconds=5)
        return Answer(error=str(why_stop()), kind="UpdateInterruptedError")

    auto.steps.answers = [long]
    auto.look()
    assert auto.last("update.interrupted")["reason"] == "quiet hours 11:00-13:00"


# After a failure


def test_failures_wait_longer_and_longer_and_the_third_stops(rig: Callable[..., Rig]) -> None:
    auto = rig()
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    auto.steps.answers = [failed()] * 3
    auto.look()
    for count, pause in ((1, 60), (2, 240)):
        assert auto.look() == pause
        assert auto.last("update.failed")["failures"] == count
        auto.start()  # The count is kept.
        auto.clock.on(seconds=pause - 1)
        auto.look()
        assert len(auto.steps.updates) == count
        auto.clock.on(seconds=1)
        auto.look()
    assert auto.seen[-2:] == ["update.failed", "automation.stopped"]
    auto.clock.on(days=1)
    auto.look()
    assert len(auto.steps.updates) == 3
    reason = auto.last("automation.stopped")["reason"]
    assert reason.startswith("stopped 2101-03-04 12:05 after 3 failures in a row, the last: it broke")
    status = overview.status(auto.ws)["automation"]
    assert (status["problem"], status["running"]) == (reason, False)
    auto.start()
    auto.look()
    assert [auto.seen.count(name) for name in ("automation.stopped", "update.failed")] == [2, 3]  # Told once more.
    assert auto.last("automation.stopped")["reason"] == reason and "treering watch --resume" in reason
    assert loop.resume(auto.ws)
    assert not loop.resume(auto.ws)
    auto.start()
    auto.look()
    assert current(auto.ws) == "v1"
    assert "automation.resumed" in auto.seen


def test_a_success_forgets_failures(rig: Callable[..., Rig]) -> None:
    auto = rig()
    for task in ("pens", "cups"):
        auto.ws.ingest(toy_rows(task, 20), task=task)
        auto.steps.answers = [failed()] * 2
        for pause in (60, 240, 0):
            auto.look()
            auto.clock.on(seconds=pause)
    assert (current(auto.ws), auto.loop.state.failures) == ("v2", {})


def test_wrong_settings_are_a_failure_that_is_told(rig: Callable[..., Rig]) -> None:
    auto = rig()
    good = (auto.ws.root / "treering.yaml").read_text()
    (auto.ws.root / "treering.yaml").write_text("lora_rnak: 3\n")
    auto.look()
    assert "did you mean 'lora_rank'" in auto.last("look.failed")["reason"]
    auto.clock.on(seconds=59)
    auto.look()
    assert auto.loop.state.failures == {"look": 1}
    auto.clock.on(seconds=1)
    auto.look()
    assert auto.loop.state.failures == {"look": 2}
    (auto.ws.root / "treering.yaml").write_text(good)
    auto.clock.on(minutes=4)
    put(auto.ws, "pens")
    auto.until_idle()
    assert (current(auto.ws), auto.loop.state.failures) == ("v1", {})


def test_new_settings_hold_at_once(rig: Callable[..., Rig]) -> None:
    auto = rig(min_rows=100)
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    auto.look()
    settings(auto.ws, min_rows=10)
    auto.look()
    assert auto.steps.updates == [None]
    # And say nothing of what a version is made of.
    assert "automate" not in registry.versions(auto.ws)[0].manifest["config"]


def test_an_update_that_takes_the_loop_with_it_is_a_failure(rig: Callable[..., Rig]) -> None:
    auto = rig()
    auto.ws.ingest(toy_rows("pens", 20), task="pens")

    def die(_: object) -> Answer:
        raise SystemExit

    for count in (1, 2, 3):
        auto.steps.answers = [die]
        with pytest.raises(SystemExit):
            auto.look()
        auto.start()
        auto.look()
        assert auto.loop.state.failures == {"update": count}
        auto.clock.on(hours=1)
    assert "it was killed, or the machine went down" in str(auto.loop.state.stopped)


def test_a_resume_reaches_a_loop_that_runs(workspace: MakeWorkspace, capsys: pytest.CaptureFixture[str]) -> None:
    ws = workspace()
    State(stopped="stopped yesterday").save(ws.root)
    with ws.lock("run", "watch"):
        assert run(["watch", "--resume", "--json", "-w", str(ws.root)]) == 0
        assert json.loads(capsys.readouterr().out)["ended"] == "resumed"
        assert State.load(ws.root).stopped is None
        assert run(["watch", "--resume", "-w", str(ws.root)]) == 1  # Nothing to resume: one loop a workspace.
        assert "in use by `treering run`" in capsys.readouterr().err
    State(stopped="stopped yesterday").save(ws.root)
    assert run(["watch", "-w", str(ws.root)]) == 1
    assert run(["status", "-w", str(ws.root)]) == 0
    assert "UPDATES BY THEMSELVES HAVE STOPPED: stopped yesterday" in capsys.readouterr().out
    assert run(["history", "-w", str(ws.root)]) == 0
    assert "automation.resumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"updates": 1', "EOF"),
        ('{"updates": -1}', "greater than or equal to 0"),
        ("\0" * 40, "JSON"),
        ("[]", "object"),
    ],
)
def test_a_damaged_state_is_a_clear_error(
    workspace: MakeWorkspace, capsys: pytest.CaptureFixture[str], content: str, told: str
) -> None:
    ws = workspace()
    (ws.root / FILE).write_text(content)
    assert run(["watch", "--once", "-w", str(ws.root)]) == 1
    error = capsys.readouterr().err
    assert f"{ws.root / FILE} is damaged" in error and told in error and "remove it" in error
    assert run(["status", "-w", str(ws.root)]) == 0
    assert "is damaged" in capsys.readouterr().out


def test_a_newer_state_and_a_damaged_log_are_clear_errors(workspace: MakeWorkspace) -> None:
    ws = workspace()
    State(format=2).save(ws.root)
    with pytest.raises(TreeringError, match=r"has format 2, newer than 1: update treering"):
        State.load(ws.root)
    log = ws.root / events.FILE
    log.write_text('{"time": "2026-11-22T10:00:00+00:00", "event": "update.started"}\n{"time": "20')
    assert len(events.history(ws)) == 1  # A line that a crash cut off is none.
    log.write_text('{"event": "update.started"}\n')
    with pytest.raises(TreeringError, match=r"events\.jsonl, line 1 is damaged"):
        events.history(ws)


def test_a_full_disk_does_not_end_the_loop(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = rig()
    auto.ws.ingest(toy_rows("pens", 20), task="pens")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("treering.automate.state.write_file", full)
        patch.setattr("treering.automate.events.append_line", full)
        assert auto.look() == loop.LOOK_AGAIN
    assert f"cannot write to {auto.ws.root}: no space is left. Free some space" in capsys.readouterr().err
    auto.clock.on(minutes=1)
    auto.until_idle()
    assert current(auto.ws) == "v1"


# From a thread, and as processes


def test_run_ends_when_asked_and_waits_for_a_resume(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STOPPED", 0.0)
    monkeypatch.setattr(inbox, "_TICK", 0.05)
    ws = workspace(automate={"settle_seconds": 0, "max_failures": 1}, **ONE_STEP)
    put(ws, "pens")
    steps, stop = Steps(ws), threading.Event()
    steps.answers = [failed()]
    auto = Automation(ws, perform=steps)
    ended: list[str] = []
    thread = threading.Thread(target=lambda: ended.append(auto.run(stop, stay=True)))
    thread.start()
    wait_for(lambda: State.load(ws.root).stopped is not None)
    assert loop.resume(Workspace(ws.root))
    wait_for(lambda: current(ws) == "v1")
    stop.set()
    thread.join(DEADLINE)
    assert ended == ["asked"]
    assert State.load(ws.root).running is None
    assert events.history(ws)[-1]["event"] == "automation.ended"


def test_run_ends_when_failures_stop_it(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "_TICK", 0.05)
    ws = workspace(automate={"max_failures": 1}, **ONE_STEP)
    ws.ingest(toy_rows("pens", 20), task="pens")
    steps = Steps(ws)
    steps.answers = [failed()]
    assert Automation(ws, perform=steps).run(threading.Event()) == "stopped"


def test_once(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "_TICK", 0.05)
    ws = workspace(automate={"settle_seconds": 0}, **ONE_STEP)
    steps = Steps(ws)
    assert Automation(ws, perform=steps).run(threading.Event(), once=True) == "idle"
    put(ws, "pens")
    steps.answers = [failed()]
    assert Automation(ws, perform=steps).run(threading.Event(), once=True) == "failed"
    assert Automation(ws, perform=steps).run(threading.Event(), once=True) == "idle"
    assert current(ws) == "v1"
    # One that was killed is tried again at once.
    put(ws, "cups")
    State(running=datetime.now(UTC), pending="18 new rows").save(ws.root)
    assert Automation(ws, perform=steps).run(threading.Event(), once=True) == "idle"
    assert (current(ws), State.load(ws.root).failures) == ("v2", {})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


DYING = """
import os, signal
from treering.automate.child import main
from treering.checkpoints import Checkpoints
keep = Checkpoints.save
def save(self, log):
    keep(self, log)
    if log:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save
main()
"""


@pytest.fixture
def same_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes take treering from where this one has it."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("same_code")
def test_a_killed_update_is_resumed(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = workspace(save_steps=2, **{**ONE_STEP, "max_steps": 4})
    ws.ingest(toy_rows("pens", 20), task="pens")
    clock = Clock()
    auto = Automation(ws, clock=clock)
    with monkeypatch.context() as patch:
        patch.setattr(children, "COMMAND", (sys.executable, "-P", "-c", DYING))
        auto.look()
    failure = events.history(ws)[-1]
    assert failure["event"] == "update.failed" and "SIGKILL" in failure["reason"] and "memory" in failure["reason"]
    assert {path.name for path in ws.versions.glob(".staging-*/checkpoints/*")} == {"step-0", "step-2"}
    clock.on(minutes=1)
    auto._perform = Steps(ws)  # In this process: another start of Python shows nothing more.
    auto.look()
    assert (current(ws), auto.state.failures, auto.state.updates) == ("v1", {}, 2)
    assert "it was resumed" not in events.history(ws)[-1]["reason"]  # With all its rows.
    assert not list(ws.versions.glob(".staging-*"))


@pytest.mark.usefixtures("same_code")
def test_the_program_ends_cleanly_and_goes_on(workspace: MakeWorkspace) -> None:
    """SIGTERM goes on to the update, which keeps a checkpoint; started again, the rest is done."""
    ws = workspace(automate={"settle_seconds": 0}, save_steps=1, **{**ONE_STEP, "max_steps": 300, "warmup_ratio": 0.0})
    put(ws, "pens")
    program = [sys.executable, "-P", "-c", "from treering.cli import main; main()", "watch", "-w", str(ws.root)]
    process = subprocess.Popen([*program, "--json"], stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: any(ws.versions.glob(".staging-*/checkpoints/step-*")) or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == 0
    assert json.loads(out) == {"ended": "asked", "reason": None, "current": None}
    DOCS["watch"].check(json.loads(out))
    assert [entry["event"] for entry in events.history(ws)][-2:] == ["update.interrupted", "automation.ended"]
    assert any(ws.versions.glob(".staging-*/checkpoints/step-*"))
    state = State.load(ws.root)
    assert (state.running, state.updates, state.failures) == (None, 0, {})
    assert state.pending == "18 new rows"


def test_an_orphan_asks_itself_to_stop(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once whoever gave the order is gone, its end of the pipe closes, and the step ends as SIGTERM ends it."""
    program = (
        "import os, signal, sys, time\nfrom treering.automate import child\n"
        "child.perform = lambda ws, order: time.sleep(600)\nchild.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    process.stdin.write(
        json.dumps({"step": "update", "workspace": str(workspace().root), "file": None}).encode() + b"\n"
    )
    process.stdin.close()
    assert process.wait(DEADLINE) == -signal.SIGTERM


def test_an_orphan_that_ends_by_itself_has_nobody_to_tell(workspace: MakeWorkspace) -> None:
    ws = workspace()
    process = subprocess.Popen(
        children.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stdin.write(json.dumps({"step": "ingest", "workspace": str(ws.root), "files": []}).encode() + b"\n")
    process.stdin.flush()
    assert (process.wait(DEADLINE), process.stderr.read()) == (0, b"")
    process.stdin.close()
    process.stderr.close()


def test_what_a_child_refuses_is_told_with_its_kind(tmp_path: Path) -> None:
    found = children.run({"step": "update", "workspace": str(tmp_path)}, lambda: None)
    assert found.kind == "UsageError" and found.error is not None and str(tmp_path) in found.error


@pytest.mark.parametrize(
    ("program", "kind", "told"),
    [
        ("print('noise'); print('{\"status\": \"held\"}')", "", None),
        ('print(\'{"error": "no", "kind": "LockError"}\')', "LockError", "no"),
        ("raise SystemExit(3)", "killed", "it ended with exit code 3"),
        ("import os; os.abort()", "killed", "signal 6 (SIGABRT)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "memory"),
        ("import os; os.close(0); raise SystemExit(4)", "killed", "exit code 4"),
    ],
)
def test_how_a_child_ended_is_understood(
    monkeypatch: pytest.MonkeyPatch, program: str, kind: str, told: str | None
) -> None:
    monkeypatch.setattr(children, "COMMAND", (sys.executable, "-c", program))
    answer = children.run({"step": "update"}, lambda: None)
    assert answer.kind == kind
    assert told is None if answer.error is None else str(told) in answer.error


def test_a_long_answer_is_read_while_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe holds 64 KiB; a child that has more to say waits until somebody reads."""
    program = "import json; print(json.dumps({'status': 'held', 'reason': 'x' * 1_000_000}))"
    monkeypatch.setattr(children, "COMMAND", (sys.executable, "-c", program))
    deadline = time.monotonic() + 60
    answer = children.run({"step": "update"}, lambda: "too long" if time.monotonic() > deadline else None)
    assert (answer.error, len(answer.value["reason"])) == (None, 1_000_000)


def test_what_is_told_of_files_does_not_grow_with_them(workspace: MakeWorkspace) -> None:
    ws = workspace()
    path = put(ws, "pens", rows=[{"odd": number} for number in range(150)])
    told = perform(ws, {"step": "ingest", "files": [str(path)]})
    assert told == {
        "rows": 150,
        "accepted": 0,
        "duplicates": 0,
        "quarantined": 150,
        "held_out": 0,
        "reasons": {"unknown-format": 150},
    }


# What must not end it


def test_a_name_that_is_not_utf8_is_told_and_stops_nothing(rig: Callable[..., Rig]) -> None:
    auto = rig()
    put(auto.ws, "pens")
    for folder in (auto.ws.inbox, auto.ws.inbox / "pens"):
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl")).write_text("{}\n")
    auto.until_idle()
    assert (current(auto.ws), auto.loop.state.failures) == ("v1", {})
    told = [entry for entry in events.history(auto.ws) if entry["event"] == "file.ignored"]
    assert [Path(entry["file"]).name for entry in told] == ["caf\\udce9.jsonl"] * 2
    assert "is not UTF-8; rename it" in told[0]["reason"]
    assert overview.status(auto.ws)["inbox"] == ["caf\\udce9.jsonl", "pens/caf\\udce9.jsonl"]


def test_a_bug_is_a_failure_that_is_told(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    auto = rig()

    def fail(*_: object) -> None:
        raise KeyError("what nobody thought of")

    with monkeypatch.context() as patch:
        patch.setattr(auto.loop.agenda, "next", fail)
        assert auto.look() == loop.LOOK_AGAIN
    assert auto.last("look.failed")["reason"] == "KeyError: 'what nobody thought of'"
    assert "Traceback" in capsys.readouterr().err
    auto.clock.on(minutes=1)
    auto.look()
    assert auto.loop.state.failures == {}


def test_what_ends_the_loop_is_told(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = workspace()

    def fail(*_: object) -> None:
        raise RuntimeError("nobody thought of that")

    monkeypatch.setattr(loop, "wakeups", fail)
    with in_thread(Automation(ws)):  # A server beside it goes on.
        wait_for(lambda: (ws.root / events.FILE).exists() and "stopped" in (ws.root / events.FILE).read_text())
    assert "RuntimeError: nobody thought of that" in events.history(ws)[-1]["reason"]


def test_trouble_at_the_start_is_told_and_tried_again(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "_TICK", 0.05)
    ws = workspace()
    (ws.root / FILE).write_text("{broken")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, in_thread(Automation(ws)):
        patch.setattr("treering.automate.events.append_line", full)
        time.sleep(0.5)
    auto = Rig(ws)
    for pause in (60, 240, 0):
        auto.look()
        auto.clock.on(seconds=pause)
    assert [auto.seen.count(name) for name in ("look.failed", "automation.stopped")] == [3, 1]
    assert (ws.root / FILE).read_text() == "{broken"
    auto.look()
    assert auto.seen.count("look.failed") == 3  # It waits for the user.
    (ws.root / FILE).unlink()
    auto.look()
    put(ws, "pens", rows=[])
    auto.until_idle()
    assert (auto.loop.state.stopped, auto.seen[-1]) == (None, "rows.quarantined")


def test_only_another_loop_and_wrong_settings_keep_it_from_beginning(workspace: MakeWorkspace) -> None:
    ws = workspace()
    with ws.lock("watch", "watch"), pytest.raises(LockError), in_thread(Automation(Workspace(ws.root))):
        pytest.fail("it began")
    (ws.root / "treering.yaml").write_text("lora_rnak: 3\n")
    with pytest.raises(ConfigError), in_thread(Automation(Workspace(ws.root))):
        pytest.fail("it began")


def test_a_second_loop_beside_a_server_loads_no_model(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ws = workspace()
    loaded: list[object] = []

    async def start(engine: object) -> None:
        loaded.append(engine)

    monkeypatch.setattr("treering.serve.builtin.BuiltinEngine.start", start)
    with ws.lock("watch", "watch"):
        assert run(["run", "--port", "0", "-w", str(ws.root)]) == 1
    assert "is in use by `treering watch`" in capsys.readouterr().err
    assert loaded == []


def test_failures_on_a_full_disk_stop_it_too(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    auto = rig(updates_per_day=1)
    auto.ws.ingest(toy_rows("pens", 20), task="pens")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("treering.automate.state.write_file", full)
        for count in (1, 2, 3):
            auto.look()
            assert auto.loop.state.failures == {"look": count}
            auto.clock.on(hours=1)
        for _ in range(2):
            assert auto.look() == loop.STOPPED  # What is on the disk does not say so, and yet nobody resumed it.
            assert auto.loop.state.stopped is not None
    assert State.load(auto.ws.root).stopped is None
    auto.look()
    assert State.load(auto.ws.root).stopped == auto.loop.state.stopped
    assert auto.steps.updates == []
    assert loop.resume(auto.ws)
    auto.look()
    auto.look()
    assert current(auto.ws) == "v1"  # The day's one update: those that could not be noted did not run.


# What must not be forgotten, nor outlive its time


@pytest.mark.parametrize("bad", [False, True])
def test_a_version_that_was_not_told_is_told_at_the_start(
    rig: Callable[..., Rig], strict_gate: Callable[[Workspace], None], bad: bool
) -> None:
    auto = rig()
    strict_gate(auto.ws)
    put(auto.ws, "pens", "bad.jsonl" if bad else "good.jsonl")

    def commit_and_die(_: object) -> Answer:
        perform(auto.ws, auto.steps.orders[-1])
        raise SystemExit

    auto.steps.answers = [commit_and_die]
    with pytest.raises(SystemExit):
        auto.until_idle()
    assert {"update.promoted", "update.held", "update.failed"}.isdisjoint(auto.seen)
    auto.start()
    auto.until_idle()
    told = auto.last("update.held" if bad else "update.promoted")
    assert (told["version"], len(registry.versions(auto.ws)), waiting(auto.ws)) == ("v1", 1, {})
    assert ("rows.quarantined" in auto.seen, "update.failed" in auto.seen) == (bad, False)
    assert (auto.loop.state.failures, auto.loop.state.pending) == ({}, None)


def test_a_version_that_somebody_else_made_blames_no_file(rig: Callable[..., Rig]) -> None:
    """The loop is killed in an update, and before its next start the user tries the same rows with other settings."""
    auto = rig()
    put(auto.ws, "pens")

    def die(_: object) -> Answer:
        raise SystemExit

    auto.steps.answers = [die]
    with pytest.raises(SystemExit):
        auto.until_idle()
    by_hand = auto.ws.update("gate.min_gain=1", learning_rate=0.5)
    assert by_hand is not None and not by_hand.promote
    auto.start()
    auto.until_idle()
    assert "update.held" not in auto.seen
    assert "it was killed" in auto.last("update.failed")["reason"]
    auto.clock.on(minutes=1)
    auto.until_idle()
    assert (current(auto.ws), waiting(auto.ws), auto.ws.catalog.counts()["quarantined"]) == ("v2", {}, 0)
    assert [v.manifest["ordered"] is None for v in registry.versions(auto.ws)] == [True, False]


def test_a_version_is_told_though_the_settings_are_wrong_by_then(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settling a hold reads the settings, which somebody may be writing at that moment."""
    auto = rig()
    auto.ws.ingest(toy_rows("pens", 20), task="pens")

    def hold(_: object) -> Answer:
        monkeypatch.setattr(culprit, "to_blame", lambda _: False)
        held = auto.ws.update("gate.min_gain=1")
        assert held is not None
        (auto.ws.root / "treering.yaml").write_text("lora_rnak: 3\n")
        return Answer({"status": "held", "version": held.name, "reason": held.summary})

    auto.steps.answers = [hold]
    auto.look()
    assert auto.seen[-2:] == ["update.held", "look.failed"]


def test_a_reason_does_not_outlive_its_rows(rig: Callable[..., Rig]) -> None:
    auto = rig(min_rows=15)
    auto.steps.answers = [failed("UpdateInterruptedError")]
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    auto.look()
    assert State.load(auto.ws.root).pending == "18 rows wait, at least 15"
    assert auto.ws.update() is not None  # By hand.
    auto.ws.ingest(toy_rows("cups", 10), task="cups")
    for _ in range(2):
        auto.look()
    assert auto.steps.updates == [None]
    assert waiting(auto.ws) == {"cups": 9}


def test_an_update_does_not_begin_while_another_runs(rig: Callable[..., Rig]) -> None:
    auto = rig()
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    with Workspace(auto.ws.root).lock("update", "update"):
        for _ in range(3):
            auto.look()
            auto.clock.on(seconds=loop.LOCKED)
    assert auto.steps.orders == []
    assert [auto.seen.count(name) for name in ("update.started", "update.postponed")] == [0, 1]
    assert "is in use by `treering update`" in auto.last("update.postponed")["reason"]
    auto.look()
    assert (current(auto.ws), auto.loop.state.updates) == ("v1", 1)


def test_another_schedule_begins_anew(rig: Callable[..., Rig]) -> None:
    auto = rig(schedule="0 2 * * *")
    auto.look()
    auto.ws.ingest(toy_rows("pens", 20), task="pens")
    auto.clock.on(hours=2)
    settings(auto.ws, schedule="0 13 * * *")  # An hour ago, as the old one had it.
    auto.look()
    assert auto.steps.updates == []
    auto.clock.on(hours=23)
    auto.look()
    assert auto.steps.updates == [None]


def test_a_resume_tries_at_once(workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "_TICK", 0.05)
    ws = workspace(**ONE_STEP)
    ws.ingest(toy_rows("pens", 20), task="pens")
    State(failures={"update": 2}, retry_at=datetime.now(UTC) + timedelta(hours=1)).save(ws.root)
    stop, auto = threading.Event(), Automation(ws, perform=Steps(ws))
    thread = threading.Thread(target=auto.run, args=(stop,), kwargs={"retry": True})
    thread.start()
    wait_for(lambda: current(ws) == "v1")
    stop.set()
    thread.join(DEADLINE)
