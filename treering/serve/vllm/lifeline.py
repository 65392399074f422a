"""Runs a command for as long as standard input stays open: it ends with whoever started it, even one that was killed.

vLLM is several processes and watches no pipe; this one does, and takes all of them along.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE_SECONDS = 10.0
"""What vLLM gets to end by itself."""


def run(command: list[str]) -> int:
    """Run `command` in a process group of its own; returns its exit code, once nothing of the group is left."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(process.pid,), daemon=True).start()
    code = process.wait()
    _signal(process.pid, signal.SIGKILL)  # One that was killed leaves its workers behind.
    return code if code >= 0 else 128 - code  # As shells tell of a signal.


def _end_with_input(group: int) -> None:
    while os.read(0, 4096):
        pass
    _signal(group, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    _signal(group, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    os._exit(run(sys.argv[1:]))
