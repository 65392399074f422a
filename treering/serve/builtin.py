"""The built-in engine, seen from the server: a child process that generates, watched and started again when it dies."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treering.serve.engine import Embeddings, EngineError, Job, Piece

ATTEMPTS = 3
"""A request that was in the worker at so many of its deaths is the likely cause, and is not tried again."""

RESTART_SECONDS = 1.0
LINE_BYTES = 64 * 2**20

log = logging.getLogger("treering.serve")


@dataclass
class _Pending:
    """A request in the worker. `message` is sent again if the worker dies before anything came back."""

    message: dict[str, Any]
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    begun: bool = False
    deaths: int = 0


class BuiltinEngine:
    """Generates with transformers in a process of its own."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process: asyncio.subprocess.Process | None = None
        self._pending: dict[str, _Pending] = {}
        self._loading: dict[str, list[asyncio.Future[None]]] = {}
        self._ready = asyncio.Event()
        self._was_ready = False
        self._fatal = ""
        self._watcher: asyncio.Task[None] | None = None
        self._numbers = itertools.count()

    @property
    def alive(self) -> bool:
        """Whether a worker is up."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Start the worker and wait until the base model is loaded. Raises `EngineError` if it cannot be."""
        self._watcher = asyncio.create_task(self._watch())
        waiting = asyncio.create_task(self._ready.wait())
        await asyncio.wait({waiting, self._watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not self.alive:
            waiting.cancel()
            raise EngineError(self._fatal or "the generating process ended before it was ready")

    async def stop(self) -> None:
        """End the worker; what still runs there fails."""
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self._drop_all("the server is shutting down")

    async def load(self, version: str) -> None:
        """Have `version` ready. Raises `EngineError` with the reason why it cannot be loaded."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loading.setdefault(version, []).append(done)
        self._write({"op": "load", "version": version})
        await done

    async def generate(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces of the answer; the iterator's end, early or not, takes the job out of the worker."""
        pending = self._submit(job.id, {"op": "generate", "job": job.model_dump(exclude_defaults=True)})
        finished = False
        try:
            while not finished:
                event = _checked(await pending.events.get())
                piece = Piece.model_validate({key: value for key, value in event.items() if key not in ("event", "id")})
                finished = piece.finish is not None
                yield piece
        finally:
            if self._pending.pop(job.id, None) is not None and not finished:
                self._write({"op": "cancel", "id": job.id})

    async def embed(self, version: str, texts: list[str | list[int]]) -> Embeddings:
        """Mean of the last hidden states of each text."""
        name = f"embed-{next(self._numbers)}"
        pending = self._submit(name, {"op": "embed", "id": name, "version": version, "texts": texts})
        try:
            event = _checked(await pending.events.get())
        finally:
            self._pending.pop(name, None)
        return Embeddings(vectors=event["vectors"], tokens=event["tokens"])

    def _submit(self, id: str, message: dict[str, Any]) -> _Pending:
        if self._fatal:
            raise EngineError(self._fatal, status=503, code="engine_down")
        pending = self._pending[id] = _Pending(message)
        self._write(message)
        return pending

    def _write(self, message: dict[str, Any]) -> None:
        """Send to the worker. What it does not get because it is down is sent when the next one is ready."""
        if self._ready.is_set() and self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _watch(self) -> None:
        """Start a worker, read its events until it ends, start the next."""
        while True:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "treering.serve.worker",
                str(self._root),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
                limit=LINE_BYTES,
                start_new_session=True,
            )
            try:
                assert self._process.stdout is not None
                async for line in self._process.stdout:
                    if line.endswith(b"\n"):  # A death may cut the last one short.
                        self._receive(json.loads(line))
            finally:
                self._ready.clear()
            code = await self._process.wait()
            if not self._was_ready and not self._fatal:
                self._fatal = f"the generating process ended with code {code} before it was ready; its log says why"
            if self._fatal:
                self._drop_all(self._fatal)
                return
            log.error("the generating process ended with code %s; starting another", code)
            self._mourn()
            await asyncio.sleep(RESTART_SECONDS)

    def _receive(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "ready":
                self._ready.set()
                self._was_ready = True
                for pending in self._pending.values():
                    self._write(pending.message)
                for version in self._loading:
                    self._write({"op": "load", "version": version})
            case "fatal":
                self._fatal = event["error"]
            case "loaded":
                for done in self._loading.pop(event["version"], []):
                    if done.cancelled():
                        continue
                    if event["error"] is None:
                        done.set_result(None)
                    else:
                        done.set_exception(EngineError(event["error"], status=503, code="version_unavailable"))
            case _:
                asked = self._pending.get(event["id"])
                if asked is not None:  # Else its client has left.
                    asked.begun = True
                    asked.events.put_nowait(event)

    def _mourn(self) -> None:
        """The worker died: requests that have begun fail, the others wait for the next worker."""
        for pending in self._pending.values():
            pending.deaths += 1
            if pending.begun or pending.deaths >= ATTEMPTS:
                pending.events.put_nowait(_failure("the generating process ended while it wrote this answer"))

    def _drop_all(self, reason: str) -> None:
        for pending in self._pending.values():
            pending.events.put_nowait(_failure(reason))
        for version in list(self._loading):
            self._receive({"event": "loaded", "version": version, "error": reason})


def _failure(reason: str) -> dict[str, Any]:
    return {"event": "failed", "error": reason, "status": 503, "code": "engine_restarted"}


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    """The event, unless it tells of a failure, which is raised."""
    if event["event"] == "failed":
        raise EngineError(event["error"], status=event["status"], code=event["code"])
    return event
