"""Tell others: a command, or a webhook signed as standardwebhooks.com says. Nothing here can stop the loop."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import queue
import shlex
import subprocess
import threading
import time
import urllib.request
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

    def close(self, seconds: float = 3 * SECONDS) -> None:
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
            body = json.dumps(event, ensure_ascii=False).encode()
            if config.on_event is not None:
                command = shlex.split(config.on_event)
                self._try(f"{command[0]} on {event['event']}", partial(run, command, body, self.root))
            if config.webhook is not None and config.webhook_secret_file is not None:
                url, file = config.webhook, self.root / config.webhook_secret_file
                # No more of the address than the host: the rest may hold a key.
                name = f"webhook at {urlsplit(url).hostname} on {event['event']}"
                self._try(name, partial(post, url, body, file))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        for pause in (*PAUSES, None):
            try:
                call()
            except Exception as error:
                if pause is None:
                    self._give_up(f"{name}: {str(error) or type(error).__name__}; tried {1 + len(PAUSES)} times")
                else:
                    time.sleep(pause)
            else:
                return

    def _give_up(self, reason: str) -> None:
        with suppress(OSError):  # A full disk must not end the thread.
            self.complain(reason)


def run(command: list[str], body: bytes, folder: Path) -> None:
    """Run a command in `folder` with the event on its standard input. Raises unless it ends with 0 in time."""
    done = subprocess.run(command, input=body, stdout=subprocess.DEVNULL, cwd=folder, timeout=SECONDS, check=False)
    if done.returncode:
        raise OSError(f"it ended with exit code {done.returncode}")


def post(url: str, body: bytes, secret_file: Path) -> None:
    """POST the signed event. Raises unless the answer is a 2xx in time; redirections are not followed."""
    headers = {
        "content-type": "application/json",
        "user-agent": "treering",
        **signed(body, secret(secret_file), int(time.time())),
    }
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=SECONDS):
        pass


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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none: the event would be sent on without its body."""
