"""When to update, and when not to: pure functions of settings, clock and what waits. All times are local."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apscheduler.triggers.cron import CronTrigger

    from treering.automate.state import State
    from treering.sections import AutomateConfig

_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


@dataclass(frozen=True)
class Waiting:
    """What waits to be learned. `drift`: how far its words are from those learned, if that was asked."""

    rows: int
    oldest: datetime
    drift: float | None = None


def due(config: AutomateConfig, waiting: Waiting, now: datetime, since: datetime) -> str | None:
    """Why to update now, in words, or None. `since`: the moment up to which the schedule was followed."""
    if config.schedule is not None and next_time(config.schedule, since) <= now:
        return f"the schedule {config.schedule}"
    if config.min_rows is not None and waiting.rows >= config.min_rows:
        return f"{waiting.rows} rows wait, at least {config.min_rows}"
    if config.max_age_hours is not None and now - waiting.oldest >= timedelta(hours=config.max_age_hours):
        hours = (now - waiting.oldest) / timedelta(hours=1)
        return f"the oldest row has waited {hours:.1f} hours, at least {config.max_age_hours:g}"
    if config.drift is not None and waiting.drift is not None and waiting.drift > config.drift:
        return f"the words drifted by {waiting.drift:.2f} bits, more than {config.drift:g}"
    if (config.schedule, config.min_rows, config.max_age_hours, config.drift) == (None, None, None, None):
        return f"{waiting.rows} new rows"
    return None


def blocked(config: AutomateConfig, state: State, now: datetime) -> tuple[str, datetime] | None:
    """Why no update may start or go on now, and until when, or None."""
    until = quiet_until(config.quiet_hours, now) if config.quiet_hours else None
    if until is not None:
        return f"quiet hours {config.quiet_hours}", until
    tomorrow = datetime.combine(now.astimezone().date() + timedelta(days=1), time()).astimezone()
    if config.minutes_per_day is not None and state.seconds >= 60 * config.minutes_per_day:
        return f"the day's {config.minutes_per_day:g} minutes are used up", tomorrow
    # One that runs has been counted already.
    running = state.running is not None
    if config.updates_per_day is not None and state.updates - running >= config.updates_per_day:
        return f"the day's {config.updates_per_day} updates are used up", tomorrow
    return None


def quiet_until(text: str, now: datetime) -> datetime | None:
    """When the quiet hours end that `now` lies in; None: it lies in none."""
    start, end = hours(text)
    here = now.astimezone()
    inside = start <= here.time() < end if start < end else not end <= here.time() < start
    if not inside:
        return None
    # Built from the calendar, not by adding hours: the clocks may change in between.
    day = here.date() + timedelta(days=1) if here.time() >= end else here.date()
    return datetime.combine(day, end).astimezone()


def hours(text: str) -> tuple[time, time]:
    """Beginning and end of hours such as `22:00-06:00`. Raises `ValueError`."""
    found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)", text.replace(" ", ""))
    if found is None:
        raise ValueError("write two times of day, such as 08:00-18:00")
    a, b, c, d = map(int, found.groups())
    if (a, b) == (c, d):
        raise ValueError("the two times are the same; to stop updates altogether, stop `treering watch`")
    return time(a, b), time(c, d)


def next_time(schedule: str, after: datetime) -> datetime:
    """The first moment of `schedule` later than `after`."""
    found: datetime | None = cron(schedule).get_next_fire_time(None, after + timedelta(microseconds=1))
    assert found is not None  # `cron` refuses schedules that never come.
    return found


def cron(text: str) -> CronTrigger:
    """A schedule in cron syntax, read as cron reads it: 0 and 7 are Sunday. Raises `ValueError`."""
    from apscheduler.triggers.cron import CronTrigger

    fields = text.split()
    if len(fields) != 5:
        raise ValueError("write the five fields of cron: minute, hour, day, month, weekday, such as 0 2 * * *")
    if fields[2] != "*" and fields[4] != "*":
        raise ValueError("give a day of the month or a weekday, not both: programs read that differently")
    try:
        # APScheduler counts weekdays from Monday.
        trigger = CronTrigger.from_crontab(" ".join([*fields[:4], _weekdays(fields[4])]))
        if trigger.get_next_fire_time(None, datetime.now().astimezone()) is None:
            raise ValueError("that day never comes")
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot be read as cron: {error}") from None
    return trigger


def _weekdays(field: str) -> str:
    """A weekday field of cron as a list of names."""
    if field == "*":
        return field
    days: set[str] = set()
    for part in field.lower().split(","):
        found = re.fullmatch(r"(?:\*|([a-z]+|\d)(?:-([a-z]+|\d))?)(?:/([1-9]))?", part)
        if found is None:
            raise ValueError(f"weekday {part!r} is none; take 0 to 7 or sun to sat")
        first, last, step = found.groups()
        if first is None:
            begin, end = 0, 6
        else:
            begin = _weekday(first)
            end = _weekday(last) if last else 6 if step else begin
        if last and end < begin:
            end += 7
        days.update(_DAYS[day % 7] for day in range(begin, end + 1, int(step or 1)))
    return ",".join(sorted(days, key=_DAYS.index))


def _weekday(text: str) -> int:
    if text in _DAYS:
        return _DAYS.index(text)
    if text in "01234567":
        return int(text)
    raise ValueError(f"weekday {text!r} is none; take 0 to 7 or sun to sat")
