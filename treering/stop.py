"""Ending an update when asked: a flag that SIGTERM and Ctrl-C set, looked at between steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from treering.errors import UpdateInterruptedError


class Stop:
    """Whether SIGTERM or Ctrl-C asked the update to end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def is_set(self) -> bool:
        """The same, under the name that `threading.Event` has for it."""
        return self.asked

    def check(self) -> None:
        """Raise `UpdateInterruptedError` if asked to stop."""
        if self.asked:
            raise UpdateInterruptedError(
                "stopped as asked; run `treering update` again: it goes on from what was done, checkpoints included"
            )


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGTERM and SIGINT into a flag while inside (in the main thread; elsewhere Python allows no handlers)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            # None: it was not set by Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
