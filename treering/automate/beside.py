"""The loop in a thread, beside something else that goes on whatever becomes of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from treering.errors import ConfigError, LockError

if TYPE_CHECKING:
    from treering.automate.loop import Automation

log = logging.getLogger("treering.automate")


@contextmanager
def in_thread(automation: Automation) -> Iterator[None]:
    """Run `automation` for as long as the context lasts.

    Raises what keeps it from beginning, before anything else is done: another loop that runs, or wrong settings.
    """
    stop, begun = threading.Event(), threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        try:
            automation.run(stop, stay=True, begun=begun.set)
        except (LockError, ConfigError) as error:
            failures.append(error)
        except Exception:
            log.exception("updates by themselves have ended; the server goes on")
        finally:
            begun.set()

    thread = threading.Thread(target=run, name="automation")
    thread.start()
    try:
        begun.wait()
        if failures:
            raise failures[0]
        yield
    finally:
        stop.set()
        thread.join()
