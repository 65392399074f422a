"""The built-in engine, seen from the server: a child process that generates, watched and started again when it dies."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treering.files import stamp
from treering.serve.engine import Embeddings, EngineError, Job, Piece

ATTEMPTS = 3
"""A request that was in the worker at so many of its deaths is the likely cause, and is not tried again."""

LOADS = 2
"""So is a version that was being read at so many: fewer, so that who waits meanwhile is not taken for the cause."""

RESTART_SECONDS = 1.0
MOST_RESTART_SECONDS = 60.0
"""A worker that does not get ready is started again after a pause, each twice as long as the one before, up to this."""

PING_SECONDS = 10.0
PINGS = 12
"""A worker that answers none of so many, one sent every so many seconds, hangs, and is ended."""

SILENT_PINGS = 3
"""One that has left so many unanswered is not alive, as who asks is told, but may come back."""

LINE_BYTES = 64 * 2**20
WORKER = (sys.executable, "-m", "treering.serve.worker")

log = logging.getLogger("treering.serve")


@dataclass
class _Pending:
    """A request in the worker. Its line is sent again after a death, if its client has had nothing of the answer."""

    version: str
    line: bytes
    whole: bool
    events: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)
    begun: bool = False
    deaths: int = 0


class BuiltinEngine:
    """Generates with transformers in a process of its own: `worker`, given the workspace's folder."""

    def __init__(self, root: Path, worker: Sequence[str] = WORKER) -> None:
        self._root = root
        self._worker = worker
        self._process: asyncio.subprocess.Process | None = None
        self._pending: dict[str, _Pending] = {}
        self._loading: dict[tuple[str, bool], list[asyncio.Future[None]]] = {}
        self._kept: str | None = None
        self._reading: str | None = None
        self._deaths: Counter[tuple[str, object]] = Counter()  # Of each version that was being read, as it was then.
        self._ready = asyncio.Event()
        self._was_ready = False
        self._fatal = ""
        self._down = "the generating process was not started"
        self._watcher: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._unanswered = 0

    @property
    def alive(self) -> bool:
        """Whether a worker is up, and not silent."""
        return self._ready.is_set() and self._unanswered < SILENT_PINGS

    async def start(self) -> None:
        """Start the worker and wait until the base model is loaded. Raises `EngineError` if it cannot be."""
        self._down = ""
        self._watcher = asyncio.create_task(self._watch())
        waiting = asyncio.create_task(self._ready.wait())
        await asyncio.wait({waiting, self._watcher}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not self.alive:
            raise EngineError(self._down)

    async def stop(self) -> None:
        """End the worker; what still runs there fails."""
        self._give_up("the server is shutting down")
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def load(self, version: str, *, keep: bool = False) -> None:
        """Have `version` ready, and `keep` it so. Raises `EngineError` with the reason why it cannot be loaded."""
        self._check(version)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asked = version, keep
        waiting = self._loading.setdefault(asked, [])
        waiting.append(done)
        self._write(_load(*asked))
        try:
            await done
        finally:
            waiting.remove(done)
            if not waiting and self._loading.get(asked) is waiting:
                del self._loading[asked]
        if keep:
            self._kept = version

    async def generate(self, job: Job) -> AsyncIterator[Piece]:
        """Pieces of the answer; the iterator's end, early or not, takes the job out of the worker."""
        held: list[Piece] = []
        finished = False
        with self._asked(job.id, job.version, {"op": "generate", "job": dict(job)}, job.whole) as events:
            while not finished:
                event = _checked(await events.get())
                if event["event"] == "again":
                    held.clear()
                    continue
                piece = Piece.model_validate({key: value for key, value in event.items() if key not in ("event", "id")})
                finished = piece.finish is not None
                if job.whole:
                    held.append(piece)
                else:
                    yield piece
        for piece in held:
            yield piece

    async def embed(self, version: str, texts: list[str | list[int]]) -> Embeddings:
        """Mean of the last hidden states of each text."""
        name = f"embed-{next(self._numbers)}"
        found: dict[int, dict[str, Any]] = {}
        with self._asked(name, version, {"op": "embed", "id": name, "version": version, "texts": texts}) as events:
            while (event := _checked(await events.get()))["event"] != "embedded":
                if event["event"] == "vector":
                    found[event["at"]] = event
        vectors = [found[at]["vector"] for at in range(len(texts))]
        return Embeddings(vectors=vectors, tokens=sum(event["tokens"] for event in found.values()))

    @contextmanager
    def _asked(
        self, id: str, version: str, message: dict[str, Any], whole: bool = True
    ) -> Iterator[asyncio.Queue[dict[str, Any]]]:
        """The events of a request that is in the worker until this ends."""
        self._check(version)
        pending = _Pending(version, _line(message), whole)
        self._pending[id] = pending
        self._write(pending.line)
        try:
            yield pending.events
        finally:
            if self._pending.pop(id, None) is not None:
                self._write(_line({"op": "cancel", "id": id}))

    def _check(self, version: str) -> None:
        """Raises `EngineError` if asking for `version` is in vain."""
        if self._down:
            raise EngineError(self._down, status=503, code="engine_down")
        if self._kills(version):
            raise EngineError(_killed(version), status=503, code="version_unavailable")

    def _kills(self, version: str) -> bool:
        """Whether the worker died too often while it read `version`. Once its files are others, it may try again."""
        return any(name == version for name, _ in self._deaths) and self._deaths[self._marked(version)] >= LOADS

    def _marked(self, version: str) -> tuple[str, object]:
        return version, stamp(self._root / "versions" / version)

    def _write(self, line: bytes) -> None:
        """Send to the worker. What it does not get because it is down is sent when the next one is ready."""
        if self._ready.is_set() and self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(line)

    async def _watch(self) -> None:
        """Start a worker, see it to its end, start the next. One that never got ready ends this, if it is the first."""
        pause = RESTART_SECONDS
        try:
            while True:
                ready, end = await self._live()
                if ready:
                    log.error("%s; starting another", end)
                    self._mourn()
                    pause = RESTART_SECONDS
                else:
                    self._give_up(end)
                    if not self._was_ready:
                        return
                    log.error("%s; trying again in %g s", end, pause)
                await asyncio.sleep(pause)
                if not ready:
                    pause = min(2 * pause, MOST_RESTART_SECONDS)
        finally:
            if not self._down:
                self._give_up("nothing watches the generating process any more; restart the server")

    async def _live(self) -> tuple[bool, str]:
        """One worker, from its start to its end; returns whether it got ready, and how it ended."""
        self._fatal = ""
        try:
            process = self._process = await asyncio.create_subprocess_exec(
                *self._worker,
                str(self._root),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
                limit=LINE_BYTES,
                start_new_session=True,
            )
        except OSError as error:
            return False, f"the generating process cannot be started ({error})"
        assert process.stdout is not None
        pinging = asyncio.create_task(self._ping(process))
        try:
            async for line in process.stdout:
                if line.endswith(b"\n"):  # A death may cut the last one short.
                    self._receive(json.loads(line))
        except ValueError as error:
            log.error("the generating process is ended, for what it says cannot be read (%s)", error)
            process.kill()
            while await process.stdout.read(LINE_BYTES):
                pass
        finally:
            pinging.cancel()
            ready = self._ready.is_set()
            self._ready.clear()
        code = await process.wait()
        when = "" if ready else " before it was ready; its log says why"
        return ready, self._fatal or f"the generating process ended with code {code}{when}"

    async def _ping(self, process: asyncio.subprocess.Process) -> None:
        """End a worker that is silent, though it was asked for a sign of life."""
        self._unanswered = 0
        while self._unanswered < PINGS:
            await asyncio.sleep(PING_SECONDS)
            if self._ready.is_set():
                self._unanswered += 1
                self._write(_line({"op": "ping"}))
        log.error("the generating process has been silent for %g s, and is ended", PINGS * PING_SECONDS)
        process.kill()

    def _receive(self, event: dict[str, Any]) -> None:
        self._unanswered = 0
        match event["event"]:
            case "ready":
                self._down, self._was_ready = "", True
                self._ready.set()
                if self._kept is not None and not self._kills(self._kept):
                    self._write(_load(self._kept, keep=True))
                for asked in self._loading:
                    self._write(_load(*asked))
                for pending in self._pending.values():
                    self._write(pending.line)
            case "pong":
                pass
            case "fatal":
                self._fatal = event["error"]
            case "reading":
                self._reading = event["version"]
            case "loaded":
                self._reading = None
                if event["error"] is None:
                    self._deaths = Counter({at: n for at, n in self._deaths.items() if at[0] != event["version"]})
                self._loaded(event["version"], event["error"])
            case kind:
                asked_for = self._pending.get(event["id"])
                if asked_for is not None:  # Else its client has left.
                    asked_for.begun = True
                    asked_for.events.put_nowait(event)
                    if kind in ("failed", "embedded") or event.get("finish"):
                        del self._pending[event["id"]]

    def _loaded(self, version: str, error: str | None) -> None:
        for keep in (False, True):
            for done in self._loading.pop((version, keep), []):
                if done.cancelled():
                    continue
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(EngineError(error, status=503, code="version_unavailable"))

    def _mourn(self) -> None:
        """The worker died: requests whose clients had a part of the answer fail, the others wait for the next one."""
        version, self._reading = self._reading, None
        if version is not None:
            self._deaths[self._marked(version)] += 1
            if self._kills(version):
                self._loaded(version, _killed(version))
                for id in [id for id, pending in self._pending.items() if pending.version == version]:
                    self._fail(id, _killed(version), "version_unavailable")
        for id, pending in list(self._pending.items()):
            pending.deaths += 1
            if (pending.begun and not pending.whole) or pending.deaths >= ATTEMPTS:
                self._fail(id, "the generating process ended while it wrote this answer", "engine_restarted")
            else:
                pending.events.put_nowait({"event": "again"})

    def _give_up(self, reason: str) -> None:
        """There is no worker, and none is expected soon: whoever waits is told, and whoever comes."""
        self._down = reason
        for id in list(self._pending):
            self._fail(id, reason, "engine_down")
        for version, _ in list(self._loading):
            self._loaded(version, reason)

    def _fail(self, id: str, reason: str, code: str) -> None:
        event = {"event": "failed", "error": reason, "status": 503, "code": code}
        self._pending.pop(id).events.put_nowait(event)


def _killed(version: str) -> str:
    return (
        f"{version} is not loaded: the generating process died {LOADS} times while reading it (its log may say why; "
        "there may be too little memory). It is tried again when its files change, or when the server is restarted"
    )


def _load(version: str, keep: bool) -> bytes:
    return _line({"op": "load", "version": version, "keep": keep})


def _line(message: dict[str, Any]) -> bytes:
    try:
        return json.dumps(message).encode() + b"\n"
    except (ValueError, RecursionError):
        raise EngineError("the request is nested too deeply", status=400, code="invalid_request") from None


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    """The event, unless it tells of a failure, which is raised."""
    if event["event"] == "failed":
        raise EngineError(event["error"], status=event["status"], code=event["code"])
    return event
