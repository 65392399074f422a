"""From jobs to a response: generated side by side, whole or as a stream, ended when the client leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Any

from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError

from treering.serve.answers import Shape
from treering.serve.engine import Engine, EngineError, Job, Piece
from treering.serve.errors import error, kind_of

ENDING_SECONDS = 5
"""How long requests that were ended, for the server ends, have to tell their clients."""

CLIENT_LEFT = 499
"""What the log says of a request that nobody waits for any more; no such status is ever sent."""

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import Receive, Scope, Send

    from treering.sections import ServeConfig
    from treering.serve.api import ChatRequest, CompletionRequest
    from treering.serve.state import Server
    from treering.serve.telemetry import Seen


Made = tuple[Shape, list[Job]]
"""What a request asks of one version, and the shape of the response."""


async def answer(
    request: Request,
    server: Server,
    seen: Seen,
    body: ChatRequest | CompletionRequest,
    make: Callable[[str, str], Made],
) -> Any:
    """Answer by the version that was asked for, or by the one on trial, if this request is its part.

    What the one on trial cannot answer, current does. `make` makes the jobs of a version, named for the attempt.
    """
    if server.settings.log_contents:
        seen.contents = {"request": body.model_dump(exclude_none=True)}
    version = server.following.version(body.model)
    seen.model = body.model
    part = seen.part = server.trial.part(body.model, version, body.user, seen.key, len(server.keys.all()))
    if part is not None and part.arm == "canary" and not part.failed:
        seen.version = part.version
        try:
            return await _respond(request, server, seen, make(part.version, "-canary"), body)
        except EngineError as failure:
            if failure.status < 500:
                raise
            server.trial.failed(part, failure)
            seen.first_token = None
    seen.version = version
    made = make(version, "")
    if part is not None and part.mode == "shadow":
        part.jobs = made[1]
    return await _respond(request, server, seen, made, body)


async def _respond(
    request: Request,
    server: Server,
    seen: Seen,
    made: Made,
    body: ChatRequest | CompletionRequest,
) -> Any:
    """Generate side by side, and answer with all of it, or with a stream."""
    shape, jobs = made
    seconds = server.settings.request_timeout
    pieces = together(server.engine, jobs)
    if body.stream:
        with ExitStack() as inside:
            inside.enter_context(server.limits.entered(len(jobs)))
            # Until the first token is there, a failure has a status of its own, and another version may still answer.
            started = time.perf_counter()
            first = await unless_gone(request, seconds, anext(pieces))
            seen.first_token = time.perf_counter() - seen.started
            pieces, seconds = _from(first, pieces), seconds - (time.perf_counter() - started)
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = _stream(seen, shape, pieces, [[] for _ in jobs], with_usage, seconds)
            return _StreamResponse(events, inside.pop_all(), seen, server.settings)
    with server.limits.entered(len(jobs)):
        answers: list[list[Piece]] = [[] for _ in jobs]

        async def collect() -> None:
            async for index, piece in pieces:
                answers[index].append(piece)

        await unless_gone(request, seconds, collect())
    _note(seen, shape, answers, whole=True)
    return shape.whole(answers)


async def _stream(
    seen: Seen,
    shape: Shape,
    pieces: AsyncGenerator[tuple[int, Piece]],
    answers: list[list[Piece]],
    with_usage: bool,
    seconds: float,
) -> AsyncIterator[str]:
    """Events as OpenAI sends them; what fails midway ends the stream with an error event."""
    whole = False
    try:
        async with aclosing(_within(seconds, pieces)) as timed:
            async for index, piece in timed:
                answers[index].append(piece)
                chunk = shape.chunk(index, answers[index])
                if chunk is not None:
                    yield _event(chunk)
        whole = True
        if with_usage:
            yield _event(shape.usage_chunk(answers))
        yield "[DONE]"
    except (EngineError, TimeoutError) as failure:
        seen.status = 504 if isinstance(failure, TimeoutError) else failure.status
        yield _event(_failure(failure, seconds))
    except (asyncio.CancelledError, GeneratorExit):
        if not whole:
            seen.status = CLIENT_LEFT
        raise
    finally:
        _note(seen, shape, answers, whole)


class _StreamResponse(EventSourceResponse):
    """Gives back at its end what it holds in `inside`, whether or not its first event was ever sent."""

    def __init__(self, events: AsyncIterator[str], inside: ExitStack, seen: Seen, settings: ServeConfig) -> None:
        # Told to end, the server still finishes its streams. Who reads nothing for so long has left.
        grace = settings.shutdown_timeout + ENDING_SECONDS
        super().__init__(events, sep="\n", shutdown_grace_period=grace, send_timeout=settings.request_timeout)
        self._inside = inside
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        with self._inside:
            try:
                await super().__call__(scope, receive, send)
            except SendTimeoutError:
                self._seen.status = CLIENT_LEFT


async def _within(seconds: float, pieces: AsyncGenerator[tuple[int, Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces, unless waiting for them takes longer in all; the time that their reader takes is its own."""
    async with aclosing(pieces):
        while True:
            started = time.perf_counter()
            async with asyncio.timeout(seconds):
                found = await anext(pieces, None)
            if found is None:
                return
            seconds -= time.perf_counter() - started
            yield found


async def _from(first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    async with aclosing(rest):
        yield first
        async for found in rest:
            yield found


async def together(engine: Engine, jobs: list[Job]) -> AsyncGenerator[tuple[int, Piece]]:
    """Pieces of all jobs as they come, each with the number of its job. The first failure ends them all."""
    if len(jobs) == 1:
        async for piece in engine.generate(jobs[0]):
            yield 0, piece
        return
    pieces: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

    async def run(index: int, job: Job) -> None:
        try:
            async for piece in engine.generate(job):
                pieces.put_nowait((index, piece))
        finally:
            pieces.put_nowait((index, None))

    tasks = [asyncio.create_task(run(index, job)) for index, job in enumerate(jobs)]
    try:
        open_jobs = len(jobs)
        while open_jobs:
            index, found = await pieces.get()
            if found is not None:
                yield index, found
                continue
            open_jobs -= 1
            await tasks[index]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_gone(request: Request, seconds: float, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client leaves or the time is up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise EngineError("the client left", status=CLIENT_LEFT, code="client_left")
        raise TimeoutError
    except TimeoutError:
        raise EngineError(_too_long(seconds), status=504, code="timeout") from None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_long(seconds: float) -> str:
    return f"the answer took longer than {seconds:g} s (serve.request_timeout)"


def _note(seen: Seen, shape: Shape, answers: list[list[Piece]], whole: bool) -> None:
    """What the record says of the answers."""
    usage = shape.usage(answers)
    seen.prompt_tokens, seen.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    texts = ["".join(piece.text for piece in pieces) for pieces in answers]
    seen.texts = texts if whole else None
    if seen.contents is not None:
        seen.contents["answers"] = texts


def _event(content: dict[str, Any]) -> str:
    return json.dumps(content)  # ASCII: clients may take U+2028 and others for the end of a line.


def _failure(failure: EngineError | TimeoutError, seconds: float) -> dict[str, Any]:
    if isinstance(failure, EngineError):
        return error(str(failure), kind_of(failure.status), failure.code)
    return error(_too_long(seconds), "server_error", "timeout")
