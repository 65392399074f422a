"""Tell others: a command, or a webhook signed as standardwebhooks.com says. Nothing here can stop the loop."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from treering.errors import UsageError

if TYPE_CHECKING:
    from treering.sections import AutomateConfig

SECONDS = 10.0
"""Longest a command or a webhook may take."""
PAUSES = (1.0, 5.0)
"""Seconds before the second and the third try."""
_WAITING = 1000
"""Events kept for a receiver that is slow; those beyond are only in the log."""
_POST = [sys.executable, "-I", str(Path(__file__).with_name("post.py"))]


class Hooks:
    """Sends events one after the other from a thread of its own; `complain` hears of those given up."""

    def __init__(self, root: Path, complain: Callable[[str], object]) -> None:
        self.root, self.complain = root, complain
        self._queue: queue.Queue[tuple[dict[str, Any], AutomateConfig] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def send(self, event: dict[str, Any], config: AutomateConfig) -> None:
        """Hand an event over; returns at once."""
        if config.on_event is None and config.webhook is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="treering hooks", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((event, config))
        except queue.Full:
            self.complain(f"{_WAITING} events wait already; {event['event']} is only in the log")

    def close(self, seconds: float = SECONDS) -> None:
        """Wait until all is sent, but no longer than so many seconds."""
        if self._thread is None:
            return
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(seconds)
        self._thread = None

    def _work(self) -> None:
        while (found := self._queue.get()) is not None:
            event, config = found
            if config.on_event is not None:
                name = f"{config.on_event.split()[0]} on {event['event']}"
                self._try(name, partial(self._run, config.on_event, event))
            if config.webhook is not None and config.webhook_secret_file is not None:
                # No more of the address than the host: the rest may hold a key.
                name = f"webhook at {urlsplit(config.webhook).hostname} on {event['event']}"
                self._try(name, partial(self._post, config.webhook, config.webhook_secret_file, event))

    def _run(self, command: str, event: dict[str, Any]) -> None:
        run(shlex.split(command), _body(event), self.root)

    def _post(self, url: str, secret_file: str, event: dict[str, Any]) -> None:
        post(url, _body(event), self.root / secret_file)

    def _try(self, name: str, call: Callable[[], None]) -> None:
        for pause in (*PAUSES, None):
            try:
                call()
            except Exception as error:
                if pause is None:
                    self._give_up(f"{name}: {_in_words(error)}; tried {1 + len(PAUSES)} times")
                else:
                    time.sleep(pause)
            else:
                return

    def _give_up(self, reason: str) -> None:
        with suppress(OSError):  # A full disk must not end the thread.
            self.complain(reason)


def _body(event: dict[str, Any]) -> bytes:
    return json.dumps(event, ensure_ascii=False).encode()


def run(command: list[str], body: bytes, folder: Path) -> None:
    """Run a command in `folder` with the event on its standard input. Raises unless it ends with 0 in time."""
    code, _ = _within(command, body, folder, subprocess.DEVNULL)
    if code:
        raise OSError(f"it ended with exit code {code}")


def post(url: str, body: bytes, secret_file: Path) -> None:
    """POST the signed event. Raises unless the answer is a 2xx in time; redirections are not followed."""
    headers = {
        "content-type": "application/json",
        "user-agent": "treering",
        **signed(body, secret(secret_file), int(time.time())),
    }
    request = {"url": url, "headers": headers, "body": body.decode(), "seconds": SECONDS}
    code, printed = _within(_POST, json.dumps(request).encode(), secret_file.parent, subprocess.PIPE)
    if code:
        raise OSError(printed.decode().strip() or f"it ended with exit code {code}")


def _within(command: list[str], given: bytes, folder: Path, stdout: int) -> tuple[int, bytes]:
    """Exit code and output of a command that ends in time; else it is ended with all that it started."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, cwd=folder, start_new_session=True) as process:
        try:
            printed, _ = process.communicate(given, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"it took longer than {SECONDS:g} seconds") from None
    return process.returncode, printed or b""


def _in_words(error: Exception) -> str:
    """What went wrong, without the command's arguments or the address, which may hold a key."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UsageError | OSError):  # Written here.
        return str(error)
    return type(error).__name__


def signed(body: bytes, key: bytes, timestamp: int, id: str | None = None) -> dict[str, str]:
    """The three headers of a Standard Webhook: id, time in seconds, and HMAC-SHA256 over both and the body.

    The id is the same whenever the same event is sent again, so that a receiver can pass over what it has had.
    """
    id = id or f"evt_{hashlib.sha256(body).hexdigest()[:32]}"
    digest = hmac.new(key, f"{id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def secret(file: Path) -> bytes:
    """The key in a file: `whsec_` and base64 as the standard has it, else the text itself. Raises `UsageError`."""
    try:
        text = file.read_text(encoding="utf-8").strip()
        key = base64.b64decode(text[6:], validate=True) if text.startswith("whsec_") else text.encode()
    except (OSError, ValueError) as error:
        raise UsageError(f"automate.webhook_secret_file: {file} cannot be read ({error})") from None
    if len(key) < 16:
        raise UsageError(
            f"automate.webhook_secret_file: the secret in {file} is shorter than 16 bytes; make one with "
            "`openssl rand -hex 32`"
        )
    return key
