"""Starting a step in a process of its own, waiting for it, and understanding how it ended."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

_POLL = 0.2
COMMAND = (sys.executable, "-P", "-m", "treering.automate.child")


@dataclass(frozen=True)
class Answer:
    """What a step came to: `value`, or an `error` of a `kind` (an error's name, or `killed`)."""

    value: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    kind: str = ""


def run(order: dict[str, Any], why_stop: Callable[[], str | None]) -> Answer:
    """Perform `order`, asking `why_stop` now and then; a reason asks the step to stop, which it does when it can."""
    process = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the loop alone, which passes it on once.
    )
    assert process.stdin is not None
    # Taken away from `communicate`, which would close it: an order whose giver is gone is not carried out.
    orders, process.stdin = process.stdin, None
    asked: str | None = None
    try:
        orders.write(json.dumps(order).encode() + b"\n")
        orders.flush()
        # Read all along: a pipe holds 64 KiB, and a step that waits for room in it never ends.
        while (printed := _ended(process)) is None:
            if asked is None and (asked := why_stop()) is not None:
                process.terminate()
    except BrokenPipeError:
        printed, _ = process.communicate()
    except BaseException:  # A second Ctrl-C.
        process.kill()
        process.communicate()
        raise
    finally:
        with suppress(BrokenPipeError):
            orders.close()
    return _understood(printed, process.returncode, asked)


def _ended(process: subprocess.Popen[bytes]) -> bytes | None:
    """What it printed, if it ended within a moment."""
    try:
        printed: bytes = process.communicate(timeout=_POLL)[0]
    except subprocess.TimeoutExpired:
        return None
    return printed


def _understood(printed: bytes, code: int, asked: str | None) -> Answer:
    try:
        value: dict[str, Any] = json.loads(printed.splitlines()[-1])
    except (ValueError, IndexError):
        if asked is not None:
            return Answer(error=asked, kind="UpdateInterruptedError")
        return Answer(error=_how(code), kind="killed")
    if "error" not in value:
        return Answer(value)
    if value["kind"] == "UpdateInterruptedError" and asked is not None:
        return Answer(error=asked, kind=value["kind"])
    return Answer(error=value["error"], kind=value["kind"])


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "it was killed (SIGKILL); often the machine ran out of memory: lower per_device_train_batch_size or "
            "cutoff_len"
        )
    if code < 0:
        return f"it was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"it ended with exit code {code} and no answer; what it printed says why"
