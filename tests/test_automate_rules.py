"""When to update and when not, and how far words drift: no model, no clock of the machine."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering import Workspace
from treering.automate.drift import divergence, drift
from treering.automate.rules import Waiting, blocked, cron, due, hours, next_time, quiet_until
from treering.automate.state import State
from treering.config import Config
from treering.errors import ConfigError
from treering.sections import AutomateConfig

NOON = datetime(2026, 11, 22, 12)  # A Sunday.


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(day: int, hour: int, minute: int = 0) -> datetime:
    return datetime(2026, 11, day, hour, minute).astimezone()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("0 2 * * *", at(23, 2)),
        ("30 12 * * *", at(22, 12, 30)),
        ("0 12 * * *", at(23, 12)),  # Later than now.
        ("0 2 * * 0", at(29, 2)),  # Sunday, as cron counts, not as APScheduler does.
        ("0 2 * * 7", at(29, 2)),
        ("0 2 * * 1", at(23, 2)),
        ("0 2 * * 2-4", at(24, 2)),
        ("0 2 * * sat", at(28, 2)),
        ("0 2 * * 6-7", at(28, 2)),
        ("0 13 * * fri-sun", at(22, 13)),
        ("0 2 * * */2", at(24, 2)),
        ("0 2 * * 1,3/2", at(23, 2)),
        ("0 2 24 * *", at(24, 2)),
        ("*/20 * * * *", at(22, 12, 20)),
    ],
)
def test_schedules_are_read_as_cron_reads_them(schedule: str, expected: datetime) -> None:
    assert next_time(schedule, NOON.astimezone()) == expected


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        ("0 2 * *", "five fields"),
        ("daily", "five fields"),
        ("0 25 * * *", "25"),
        ("x 2 * * *", "cannot be read as cron"),
        ("0 2 * * 8", "weekday '8'"),
        ("0 2 * * someday", "weekday 'someday'"),
        ("0 2 1 * 1", "not both"),
        ("0 2 31 2 *", "never comes"),
    ],
)
def test_wrong_schedules_are_told(schedule: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cron(schedule)
    with pytest.raises(ConfigError, match=r"automate\.schedule"):
        Config.build({"automate": {"schedule": schedule}})


@pytest.mark.usefixtures("berlin")
def test_quiet_hours_keep_to_the_wall_clock_when_clocks_change() -> None:
    evening = datetime(2026, 10, 24, 23).astimezone()  # That night has an hour more.
    until = quiet_until("22:00-06:00", evening)
    assert until is not None
    assert (until.hour, until - evening) == (6, timedelta(hours=8))


@pytest.mark.parametrize(
    ("text", "now", "until"),
    [
        ("08:00-18:00", at(22, 7, 59), None),
        ("08:00-18:00", at(22, 8), at(22, 18)),
        ("08:00-18:00", at(22, 18), None),
        ("22:00-06:00", at(22, 23), at(23, 6)),
        ("22:00-06:00", at(22, 5), at(22, 6)),
        ("22:00 - 06:00", at(22, 6), None),
        ("22:00-06:00", at(22, 12), None),
        ("00:00-06:00", at(22, 0), at(22, 6)),
        ("18:00-00:00", at(22, 19), at(23, 0)),
    ],
)
def test_quiet_hours(text: str, now: datetime, until: datetime | None) -> None:
    assert quiet_until(text, now) == until


@pytest.mark.parametrize("text", ["8-18", "08:00", "08:00-24:00", "08:00-08:00", "night", "08:60-09:00"])
def test_wrong_hours_are_told(text: str) -> None:
    with pytest.raises(ValueError, match="times"):
        hours(text)
    with pytest.raises(ConfigError, match=r"automate\.quiet_hours.*got"):
        Config.build({"automate": {"quiet_hours": text}})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "9 new rows"),
        ({"min_rows": 9}, "9 rows wait, at least 9"),
        ({"min_rows": 10}, None),
        ({"min_rows": 10, "max_age_hours": 3}, "the oldest row has waited 3.0 hours, at least 3"),
        ({"max_age_hours": 3.5}, None),
        ({"drift": 0.3}, "the words drifted by 0.40 bits, more than 0.3"),
        ({"drift": 0.4}, None),
        ({"schedule": "0 11 * * *"}, "the schedule 0 11 * * *"),
        ({"schedule": "0 13 * * *"}, None),
        ({"schedule": "0 13 * * *", "min_rows": 5}, "9 rows wait, at least 5"),
    ],
)
def test_any_rule_that_is_set_starts_an_update(settings: dict[str, object], expected: str | None) -> None:
    now = NOON.astimezone()
    found = Waiting(9, now - timedelta(hours=3), 0.4)
    assert due(AutomateConfig.model_validate(settings), found, now, now - timedelta(hours=2)) == expected


def test_a_budget_is_used_up_until_midnight() -> None:
    config = AutomateConfig(updates_per_day=2, minutes_per_day=30)
    now = NOON.astimezone()
    assert blocked(config, State(updates=1, seconds=1799), now) is None
    assert blocked(config, State(updates=2), now) == ("the day's 2 updates are used up", at(23, 0))
    assert blocked(config, State(updates=2, running=now), now) is None
    assert blocked(config, State(updates=1, seconds=1800), now) == ("the day's 30 minutes are used up", at(23, 0))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"webhook": "https://x.test/"}, "webhook and webhook_secret_file go together"),
        ({"webhook": "file:///etc/passwd", "webhook_secret_file": "s"}, "https://"),
        ({"on_event": " "}, "write a command"),
        ({"on_event": "say 'x"}, "quotation"),
        ({"min_rows": 0}, "automate.min_rows"),
        ({"shedule": "0 2 * * *"}, "did you mean 'schedule'"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Config.build({"automate": settings})


counts = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1).map(Counter)


@given(counts, counts)
def test_the_divergence_is_one_between_0_and_1_and_the_same_both_ways(a: Counter[str], b: Counter[str]) -> None:
    assert 0 <= divergence(a, b) <= 1
    assert divergence(a, b) == pytest.approx(divergence(b, a))
    assert divergence(a, a) == 0
    assert divergence(a, {word: 3 * n for word, n in a.items()}) == pytest.approx(0, abs=1e-12)
    assert divergence(a, {word.upper(): n for word, n in b.items()}) == pytest.approx(1)


def test_the_divergence_is_that_of_the_books() -> None:
    # scipy gives its square root.
    from scipy.spatial.distance import jensenshannon

    a, b = {"x": 1, "y": 3}, {"x": 2, "y": 1, "z": 1}
    assert divergence(a, b) == pytest.approx(jensenshannon([1, 3, 0], [2, 1, 1], base=2) ** 2)
    assert (divergence({}, {}), divergence(a, {})) == (0, 1)


@pytest.mark.parametrize("size", [10, 100])
def test_drift_is_small_for_more_of_the_same_however_few(workspace: Callable[..., Workspace], size: int) -> None:
    rng = random.Random(0)
    words = [f"word{n}" for n in range(60)]

    def rows(vocabulary: list[str], count: int) -> list[dict[str, object]]:
        texts = (" ".join(rng.choices(vocabulary, weights=range(1, 61), k=8)) for _ in range(count))
        return [{"text": text, "label": "yes"} for text in texts]

    ws = workspace(val_size=0.0)

    def take(found: list[dict[str, object]], task: str) -> list[str]:
        ws.ingest(found, task=task)
        return ws.catalog.train_ids(task)

    learned = take(rows(words, 600), "old")
    same = drift(ws.catalog, take(rows(words, size), "same"), learned)
    other = drift(ws.catalog, take(rows(words[::-1], size), "other"), learned)
    new = drift(ws.catalog, take(rows([f"new{n}" for n in range(60)], size), "new"), learned)
    assert same < 0.05 < other < new
    assert new > 0.5
    assert drift(ws.catalog, learned[:5], []) == 1.0
    assert drift(ws.catalog, learned[:5], learned[5:6]) > 0
