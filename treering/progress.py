"""Signs of life on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

SECONDS_BETWEEN_LINES = 5.0


def say(text: str) -> None:
    """A line on standard error, for whoever watches or keeps a log."""
    with suppress(OSError, ValueError):  # Whoever read it may be gone; the work goes on.
        print(f"treering: {text}", file=sys.stderr, flush=True)


class Advance(Protocol):
    """Moves the bar on by `steps`, with a short note beside it."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Move."""


@contextmanager
def bar(title: str, total: int, quiet: bool = False) -> Iterator[Advance]:
    """A progress bar over `total` steps; yields the function that moves it."""
    if quiet or total == 0:
        yield silent
    elif sys.stderr.isatty():
        with _terminal(title, total) as advance:
            yield advance
    else:
        yield _lines(title, total)


def silent(steps: int = 1, note: str = "") -> None:
    """Shows nothing."""
    del steps, note


@contextmanager
def _terminal(title: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda steps=1, note="": progress.update(task, advance=steps, note=note)


def _lines(title: str, total: int) -> Advance:
    done = 0
    last = time.monotonic()

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES or done >= total:
            last = time.monotonic()
            with suppress(OSError, ValueError):
                print(f"{title}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    return advance
