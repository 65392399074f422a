"""Ending an update when asked by SIGTERM or Ctrl-C: at once, but for work that wants to end well and looks itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from treering.errors import UpdateInterruptedError

AGAIN = "run `treering update` again: it goes on from the last checkpoint, if there is one"


class _AskedError(BaseException):
    """Raised by a signal, at any place: no `Exception`, lest code that expects any error of a library swallows it."""


class Stop:
    """Whether SIGTERM or Ctrl-C asked what is done to end; a second Ctrl-C ends it at once. `words`: how to go on."""

    def __init__(self, words: str = AGAIN) -> None:
        self.asked = self._at_once = False
        self._words = words

    def is_set(self) -> bool:
        """The same, under the name that `threading.Event` has for it."""
        return self.asked

    def ask(self) -> None:
        """Ask it to end; the first time, it ends where it is to end `at_once`."""
        again, self.asked = self.asked, True
        if self._at_once and not again:  # A second signal finds the first one's cleaning up.
            raise _AskedError

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends what is done, wherever that is; it leaves no more behind than a kill would.

        Outside, that is `UpdateInterruptedError`.
        """
        try:
            with self._set(True):
                yield
        except _AskedError:
            self.check()

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, a signal only asks: what is done there keeps something before it ends, or is soon done."""
        with self._set(False):
            yield

    @contextmanager
    def _set(self, at_once: bool) -> Iterator[None]:
        before, self._at_once = self._at_once, at_once
        try:
            yield
        finally:
            self._at_once = before

    def check(self) -> None:
        """Raise `UpdateInterruptedError` if asked to stop."""
        if self.asked:
            raise UpdateInterruptedError(f"stopped as asked; {self._words}")


@contextmanager
def stop_on_signals(words: str = AGAIN) -> Iterator[Stop]:
    """Turn SIGTERM and SIGINT into a flag while inside (in the main thread; elsewhere Python allows no handlers).

    `words`: how to go on, for the error.
    """
    stop = Stop(words)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.ask()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            # None: it was not set by Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
