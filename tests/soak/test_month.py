"""A month of `treering run` with nobody there: files at odd times, some bad, some poisoned; crashes, a full disk."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.soak.client import Client, ask, latest, longest_gap, unanswered
from tests.soak.house import House, small_disk
from tests.soak.language import Row, Task, pretrained_model
from tests.soak.post import DAMAGES, FORMATS, MANNERS, SETTLE, damaged, encoded, put
from treering import Workspace, overview, registry
from treering.automate.state import State
from treering.data.shapes import convert
from treering.data.writer import HELD

DAYS = 30
NEW_TASKS = {1: "coffee", 3: "bikes", 6: "garden", 11: "kitchen", 17: "toys"}
BROKEN = dict(zip((4, 7, 9, 14, 20, 27), DAMAGES, strict=True))
POISONED = {5: "garden", 8: "coffee", 13: "bikes", 19: "garden", 24: "kitchen", 28: "toys"}
"""By day; the first is the very first file of its task."""
AT_ONCE = (13, 24)
"""Days on which a good file comes together with the poisoned one, so that the culprit has to be found."""
REPEATED = 12
KILLED, POWER_CUT = 10, 22
FULL_DISK = 16

A_DAY = 600.0
"""Seconds that the loop may take for a day's files, with the minute it waits after a crash."""
SLOW = 30.0
"""Seconds that an answer, or the wait for the next one, may take while the machine trains as well."""
SELDOM = 5.0
"""Seconds a request on average, at most."""
LATE = 10.0
"""Seconds after a promotion in which the version before may still answer new requests."""
SETTINGS: dict[str, Any] = {
    "bf16": False,
    "learning_rate": 2e-3,
    "num_train_epochs": 8,
    "lora_rank": 16,
    "save_steps": 10,
    "val_size": 0.2,
    "memory": {"size": 240, "replay_share": 0.6},
    "automate": {"settle_seconds": SETTLE},
}


class Month:
    """What is put into the inbox, and what is to become of it."""

    def __init__(self, ws: Workspace) -> None:
        self.ws = ws
        self.rng = random.Random("month")
        self.tasks: dict[str, Task] = {}
        self.good: set[str] = set()
        self.poisoned: dict[str, set[str]] = {}
        self.broken: list[str] = []
        self.files: list[Path] = []

    def question(self) -> str:
        """One that is asked all along."""
        task = self.tasks[random.choice(list(self.tasks))]
        return f"the {random.choice(list(task.desks))} is broken again"

    def good_file(self, task: str, count: int) -> None:
        rows = self.tasks[task].rows(count)
        self.good |= ids(rows)
        suffix = self.rng.choice(FORMATS)
        # Half a CSV file may end in half a label, which nobody can tell from a whole one.
        manner = self.rng.choice(MANNERS[:2] if suffix == "csv" else MANNERS)
        self._put(task, suffix, encoded(rows, suffix), manner)

    def repeated_file(self) -> None:
        task = self.files[0].parent.name
        self._put(task, self.files[0].suffix[1:], self.files[0].read_bytes())

    def broken_file(self, task: str, damage: str) -> None:
        suffix, content, good = damaged(damage, self.tasks[task].rows(30))
        self.good |= ids(good)
        self.broken.append(self._put(task, suffix, content))

    def poisoned_file(self, task: str) -> None:
        rows = self.tasks[task].poisoned(90)
        self.poisoned[self._put(task, "jsonl", encoded(rows, "jsonl"))] = ids(rows)

    def _put(self, task: str, suffix: str, content: bytes, manner: str = "renamed") -> str:
        path = self.ws.inbox / task / f"file-{len(self.files) + 1}.{suffix}"
        put(path, content, manner)
        self.files.append(path)
        return str(path)

    def handled(self) -> bool:
        """Whether the loop has done all there is to do."""
        state = State.load(self.ws.root)
        if state.running or state.suspects or state.retry_at or overview.unread(self.ws):
            return False
        return not self.ws.catalog.waiting(registry.consumed(self.ws, registry.current(self.ws)))

    def training(self) -> bool:
        """Whether an update runs and has kept a checkpoint."""
        return any(self.ws.versions.glob(".staging-*/checkpoints/step-*"))


def ids(rows: Sequence[Row]) -> set[str]:
    return {convert(row).id for row in rows}


@pytest.fixture
def month(tmp_path: Path) -> Iterator[Month]:
    import torch

    torch.set_num_threads(1)
    model = pretrained_model(tmp_path / "model")
    with small_disk(tmp_path / "disk", 400):
        yield Month(Workspace.create(tmp_path / "disk" / "ws", model_name_or_path=str(model), **SETTINGS))


def live_through(month: Month, house: House, day: int) -> None:
    """One day, until the loop has done with all that came."""
    known, size = list(month.tasks), month.rng.randint(40, 60)
    if day in NEW_TASKS:
        known, size = [NEW_TASKS[day]], 90
        month.tasks.setdefault(known[0], Task(known[0]))
    poisoned = POISONED.get(day)
    if poisoned:
        month.tasks.setdefault(poisoned, Task(poisoned))
        month.poisoned_file(poisoned)
        known = [task for task in known if task != poisoned]
    if day not in AT_ONCE:
        time.sleep(month.rng.uniform(0, 5))
    month.good_file(month.rng.choice(known), size)
    if day in BROKEN:
        time.sleep(month.rng.uniform(0, 5))
        month.broken_file(month.rng.choice(known), BROKEN[day])
    if day == REPEATED:
        month.repeated_file()
    if day in (KILLED, POWER_CUT):
        house.until(month.training, A_DAY)
        house.crash(everything=day == POWER_CUT)
    if day == FULL_DISK:
        house.until(month.training, A_DAY)
        with house.full_disk():
            house.until(lambda: "no space is left" in house.log, A_DAY)
    house.until(month.handled, A_DAY)


@pytest.mark.soak
def test_a_month_with_nobody_there(month: Month, tmp_path: Path, record_property: Any) -> None:
    ws = month.ws
    began = time.monotonic()
    (tmp_path / "logs").mkdir()
    month.tasks["coffee"] = Task("coffee")
    house = House(ws, tmp_path / "logs")
    client = Client(f"{house.served.url}/v1", month.question)
    client.start()
    try:
        for day in range(1, DAYS + 1):
            live_through(month, house, day)
        scores = {model: accuracy(house, month, model) for model in ("base", "current")}
    finally:
        client.stop()
        house.served.stop()

    record_property("minutes", round((time.monotonic() - began) / 60, 1))
    record_property("requests", len(client.asked))
    record_property("slowest answer, seconds", round(max(a.ended - a.began for a in client.asked), 1))
    delay = latest(client.asked, registry.history(ws))
    record_property("longest wait for a promoted version, seconds", round(delay, 1))
    record_property("versions", len(registry.versions(ws)))
    record_property("promoted", len(registry.history(ws)))
    record_property("right before, after", f"{scores['base']:.2f}, {scores['current']:.2f}")

    assert unanswered(client.asked, house.down) == []
    assert len(client.asked) >= (time.monotonic() - began) / SELDOM
    assert max(a.ended - a.began for a in client.asked if not a.error) <= SLOW
    assert longest_gap(client.asked, house.down) <= SLOW
    assert delay <= LATE
    learned_once(month)
    refused_with_a_reason(month)
    assert treering(ws, "verify")["problems"] == []
    told(month, house)
    assert scores["current"] >= 0.9 and scores["base"] <= 0.4


def accuracy(house: House, month: Month, model: str) -> float:
    """Of new questions on all tasks."""
    rows = [row for task in month.tasks.values() for row in task.rows(30)]
    answers = [ask(house.served.client, model, row["text"]).choices[0].message.content.strip() for row in rows]
    return statistics.fmean(answer == row["label"] for answer, row in zip(answers, rows, strict=True))


def learned_once(month: Month) -> None:
    """Every good row was learned once, or is of the share that judges; what ever was current learned no poison."""
    ws = month.ws
    poison = set().union(*month.poisoned.values())
    lineage = list(registry.lineage(ws, registry.current(ws)))
    learned = Counter(id for version in lineage for id in version.rows)
    held_out = {id for ids in ws.catalog.held_out().values() for id in ids}
    assert set(learned.values()) == {1}
    assert held_out < month.good
    assert learned.keys() == month.good - held_out
    assert len(held_out) <= 1.2 * SETTINGS["val_size"] * len(month.good)
    assert held_out == {id for ids in lineage[0].manifest["held_out"].values() for id in ids}
    promoted = {move["version"] for move in registry.history(ws)}
    assert promoted == {version.name for version in lineage}
    assert not poison & {id for name in promoted for id in registry.get(ws, name).rows}


def refused_with_a_reason(month: Month) -> None:
    """What is in quarantine is all of every poisoned file, and something of every broken one."""
    refused: dict[str, list[dict[str, Any]]] = {}
    for row in month.ws.catalog.quarantined():
        assert row["reason"]
        refused.setdefault(row["file"], []).append(row)
    assert refused.keys() == {*month.poisoned, *month.broken}
    for file, rows in month.poisoned.items():
        assert len(refused[file]) == len(rows)
        assert {row["rule"] for row in refused[file]} == {HELD}


def told(month: Month, house: House) -> None:
    """The history tells of each thing that went wrong, and of each that went right."""
    ws = month.ws
    events = treering(ws, "history")["events"]
    found = Counter(event["event"] for event in events)
    assert found["automation.started"] == 1 + len(house.down)
    # Of the crashes. That of the full disk may have found no room to be noted in.
    assert found["update.failed"] >= len(house.down)
    assert found["automation.stopped"] == 0
    assert found["version.promoted"] == len(registry.history(ws))
    versions: dict[bool, set[str]] = {True: set(), False: set()}
    for version in registry.versions(ws):
        versions[version.promote].add(version.name)
    assert {event["version"] for event in events if event["event"] == "update.promoted"} == versions[True]
    assert {event["version"] for event in events if event["event"] == "update.held"} == versions[False]
    refused = [event for event in events if event["event"] == "rows.quarantined"]
    assert sorted(file for event in refused if "version" in event for file in event["files"]) == sorted(month.poisoned)
    at_once = {str(ws.inbox / file) for event in refused if "version" not in event for file in event["files"]}
    assert at_once >= set(month.broken)


def treering(ws: Workspace, command: str) -> dict[str, Any]:
    """What the command prints with --json."""
    call = [sys.executable, "-c", "from treering.cli import main; main()", command, "--json", "-w", str(ws.root)]
    found: dict[str, Any] = json.loads(subprocess.run(call, check=True, capture_output=True).stdout)
    return found
