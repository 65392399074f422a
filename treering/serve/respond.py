"""From jobs to a response: generated side by side, whole or as a stream, ended when the client leaves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sse_starlette import EventSourceResponse, ServerSentEvent

from treering.serve.answers import Shape, error, kind_of
from treering.serve.engine import Engine, EngineError, Job, Piece

DRAIN_SECONDS = 30
"""What a server that was told to end gives its requests to finish."""

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import Receive, Scope, Send

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
    part = seen.part = server.trial.part(body.model, version, body.user, seen.key, len(server.keys.all()))
    if part is not None and part.arm == "canary" and not part.failed:
        seen.version = part.version
        try:
            # A stream is held back until its first token is there: so long, another version may still answer.
            return await _respond(request, server, seen, make(part.version, "-canary"), body, sure=True)
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
    *,
    sure: bool = False,
) -> Any:
    """Generate side by side, and answer with all of it, or with a stream: a `sure` one begins with its first token."""
    shape, jobs = made
    seconds = server.settings.request_timeout
    pieces = together(server.engine, jobs)
    if body.stream:
        with ExitStack() as inside:
            inside.enter_context(server.limits.entered(len(jobs)))
            if sure:
                pieces = _from(await unless_gone(request, seconds, anext(pieces)), pieces)
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = _stream(seen, shape, pieces, [[] for _ in jobs], with_usage, seconds)
            return _StreamResponse(events, inside.pop_all())
    with server.limits.entered(len(jobs)):
        answers: list[list[Piece]] = [[] for _ in jobs]

        async def collect() -> None:
            async for index, piece in pieces:
                _note_first(seen)
                answers[index].append(piece)

        await unless_gone(request, seconds, collect())
    _note(seen, answers, whole=True)
    return shape.whole(answers)


async def _stream(
    seen: Seen,
    shape: Shape,
    pieces: AsyncIterator[tuple[int, Piece]],
    answers: list[list[Piece]],
    with_usage: bool,
    seconds: float,
) -> AsyncIterator[ServerSentEvent]:
    """Events as OpenAI sends them; what fails midway ends the stream with an error event."""
    whole = False
    try:
        async with asyncio.timeout(seconds):
            async for index, piece in pieces:
                _note_first(seen)
                first = not answers[index]
                answers[index].append(piece)
                if not shape.tools:
                    yield _event(shape.chunk(index, piece, first))
                elif piece.finish:  # Whether a text is a tool call is known at its end.
                    text = "".join(one.text for one in answers[index])
                    yield _event(shape.chunk(index, piece.model_copy(update={"text": text}), first=True))
        whole = True
        if with_usage:
            yield _event(shape.usage_chunk(answers))
        yield ServerSentEvent("[DONE]")
    except (EngineError, TimeoutError) as failure:
        seen.status = 504 if isinstance(failure, TimeoutError) else failure.status
        yield _event(_failure(failure, seconds))
    finally:
        _note(seen, [pieces for pieces in answers if pieces], whole)


class _StreamResponse(EventSourceResponse):
    """Gives back at its end what it holds in `inside`, whether or not its first event was ever sent."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], inside: ExitStack) -> None:
        # Told to end, the server still finishes its streams.
        super().__init__(events, sep="\n", shutdown_grace_period=DRAIN_SECONDS)
        self._inside = inside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        with self._inside:
            await super().__call__(scope, receive, send)


async def _from(first: tuple[int, Piece], rest: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for found in rest:
        yield found


async def together(engine: Engine, jobs: list[Job]) -> AsyncIterator[tuple[int, Piece]]:
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
            raise EngineError("the client left", status=499, code="client_left")
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


def _note_first(seen: Seen) -> None:
    if seen.first_token is None:
        seen.first_token = time.perf_counter() - seen.started


def _note(seen: Seen, answers: list[list[Piece]], whole: bool) -> None:
    """What the record says of the answers."""
    seen.prompt_tokens = max((pieces[-1].prompt_tokens for pieces in answers), default=0)
    seen.completion_tokens = sum(pieces[-1].completion_tokens for pieces in answers)
    texts = ["".join(piece.text for piece in pieces) for pieces in answers]
    seen.texts = texts if whole else None
    if seen.contents is not None:
        seen.contents["answers"] = texts


def _event(content: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(content, ensure_ascii=False))


def _failure(failure: EngineError | TimeoutError, seconds: float) -> dict[str, Any]:
    if isinstance(failure, EngineError):
        return error(str(failure), kind_of(failure.status), failure.code)
    return error(_too_long(seconds), "server_error", "timeout")
