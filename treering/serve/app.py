"""The routes: OpenAI's, those of the keepers, and those of machines that watch."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from treering import __version__, overview, registry
from treering.errors import LockError, TreeringError, UsageError
from treering.serve.answers import Shape, error
from treering.serve.api import ChatRequest, CompletionRequest, EmbeddingRequest
from treering.serve.engine import BASE, Engine, EngineError, Job, Piece
from treering.serve.following import Following
from treering.serve.keys import Keys
from treering.serve.limits import Limits, TooManyError
from treering.serve.outer import Outer
from treering.serve.telemetry import Seen, Telemetry

if TYPE_CHECKING:
    from treering.config import ServeConfig
    from treering.workspace import Workspace

LOOPBACK = ["127.0.0.1", "localhost", "::1"]


class Server:
    """What the routes share."""

    def __init__(self, ws: Workspace, engine: Engine, settings: ServeConfig) -> None:
        self.ws = ws
        self.engine = engine
        self.settings = settings
        self.following = Following(ws, engine)
        self.keys = Keys(ws.root)
        self.limits = Limits(settings.max_batch_size + settings.max_queue)
        self.telemetry = Telemetry()
        self.draining = False


def create_app(ws: Workspace, engine: Engine, *, open_to_all_hosts: bool = False) -> FastAPI:
    """The application of one workspace. On loopback it answers only to loopback's names (no DNS rebinding)."""
    server = Server(ws, engine, ws.config().serve)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        await server.following.look()
        follower = asyncio.create_task(server.following.run())
        try:
            yield
        finally:
            server.draining = True
            follower.cancel()
            with suppress(asyncio.CancelledError):
                await follower
            await engine.stop()

    app = FastAPI(title="treering", version=__version__, lifespan=running)
    app.state.server = server
    app.include_router(_openai)
    app.include_router(_admin)
    app.include_router(_health)
    app.add_exception_handler(EngineError, cast(Any, _engine_error))
    app.add_exception_handler(TreeringError, cast(Any, _treering_error))
    app.add_exception_handler(RequestValidationError, cast(Any, _validation_error))
    app.add_exception_handler(HTTPException, cast(Any, _http_error))
    app.add_exception_handler(Exception, _bug)
    if not open_to_all_hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
    app.add_middleware(Outer, telemetry=server.telemetry, max_body_bytes=server.settings.max_body_bytes)
    return app


def _server(request: Request) -> Server:
    return cast(Server, request.app.state.server)


def _seen(request: Request) -> Seen:
    return cast(Seen, request.state.seen)


def _may(scope: str) -> Callable[[Request], Awaitable[None]]:
    """A check that the request's key has `scope`. With no key made, any key may use the API, and none the admin."""

    async def check(request: Request) -> None:
        server, seen = _server(request), _seen(request)
        known = server.keys.all()
        if not known and scope == "api":
            return
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        key = server.keys.find(secret.strip()) if kind.lower() == "bearer" else None
        if key is None:
            raise EngineError(
                "this server wants a key made by `treering keys create`, as `Authorization: Bearer tr-...`",
                status=401,
                code="invalid_api_key",
            )
        seen.key = key.id
        if scope == "admin" and key.scope != "admin":
            raise EngineError("this key has no admin scope", status=403, code="insufficient_scope")
        limit = key.requests_per_minute or server.settings.requests_per_minute
        if limit is not None:
            server.limits.ask(key.id, limit)

    return check


_openai = APIRouter(prefix="/v1", dependencies=[Depends(_may("api"))])
_admin = APIRouter(prefix="/admin", dependencies=[Depends(_may("admin"))])
_health = APIRouter()
Here = Annotated[Server, Depends(_server)]
Record = Annotated[Seen, Depends(_seen)]


@_openai.get("/models")
async def models(server: Here) -> dict[str, Any]:
    """What `model` may name."""
    created = {version.name: int(version.folder.stat().st_mtime) for version in registry.versions(server.ws)}
    names = {"current": created.get(server.following.serving, 0), BASE: 0, **created}
    data = [
        {"id": name, "object": "model", "created": at, "owned_by": "treering", "version": _named(server, name)}
        for name, at in names.items()
    ]
    return {"object": "list", "data": data}


@_openai.get("/models/{name}")
async def model(name: str, server: Here) -> dict[str, Any]:
    """One of them."""
    version = server.following.version(name)
    return {"id": name, "object": "model", "created": 0, "owned_by": "treering", "version": version}


def _named(server: Server, name: str) -> str:
    return server.following.serving if name == "current" else name


@_openai.post("/chat/completions", response_model=None)
async def chat_completions(body: ChatRequest, request: Request, server: Here, seen: Record) -> Any:
    """Answer a conversation."""
    version = seen.version = server.following.version(body.model)
    name = f"chatcmpl-{seen.id.removeprefix('req-')}"
    shape = Shape(name, "chat.completion", body.model, version, tools=bool(body.active_tools))
    return await _respond(request, shape, body.jobs(name, version), body)


@_openai.post("/completions", response_model=None)
async def completions(body: CompletionRequest, request: Request, server: Here, seen: Record) -> Any:
    """Go on with a text."""
    version = seen.version = server.following.version(body.model)
    name = f"cmpl-{seen.id.removeprefix('req-')}"
    return await _respond(request, Shape(name, "text_completion", body.model, version), body.jobs(name, version), body)


@_openai.post("/embeddings", response_model=None)
async def embeddings(body: EmbeddingRequest, request: Request, server: Here, seen: Record) -> Any:
    """Vectors of texts: the mean of the last hidden states."""
    version = seen.version = server.following.version(body.model)
    texts = body.texts()
    with server.limits.entered(1):
        found = await _unless_gone(request, server.settings.request_timeout, server.engine.embed(version, texts))
    seen.prompt_tokens = found.tokens
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
            if body.encoding_format == "base64"
            else vector,
        }
        for index, vector in enumerate(found.vectors)
    ]
    return {
        "object": "list",
        "data": data,
        "model": body.model,
        "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
    }


async def _respond(request: Request, shape: Shape, jobs: list[Job], body: ChatRequest | CompletionRequest) -> Any:
    """Generate `jobs` side by side, and answer with all of them, or with a stream."""
    server, seen = _server(request), _seen(request)
    if server.settings.log_contents:
        seen.contents = {"request": body.model_dump(exclude_none=True)}
    if body.stream:
        inside = server.limits.entered(len(jobs))
        inside.__enter__()  # The stream leaves it, at its end.
        events = _stream(
            server, seen, shape, jobs, bool(body.stream_options and body.stream_options.include_usage), inside
        )
        return EventSourceResponse(events, sep="\n")
    with server.limits.entered(len(jobs)):
        answers: list[list[Piece]] = [[] for _ in jobs]

        async def collect() -> None:
            async for index, piece in _together(server.engine, jobs):
                _note_first(seen)
                answers[index].append(piece)

        await _unless_gone(request, server.settings.request_timeout, collect())
    _note(seen, answers)
    return shape.whole(answers)


async def _stream(
    server: Server, seen: Seen, shape: Shape, jobs: list[Job], with_usage: bool, inside: Any
) -> AsyncIterator[ServerSentEvent]:
    """Events as OpenAI sends them; what fails midway ends the stream with an error event."""
    answers: list[list[Piece]] = [[] for _ in jobs]
    try:
        async with asyncio.timeout(server.settings.request_timeout):
            async for index, piece in _together(server.engine, jobs):
                _note_first(seen)
                first = not answers[index]
                answers[index].append(piece)
                if not shape.tools:
                    yield _event(shape.chunk(index, piece, first))
                elif piece.finish:  # Whether a text is a tool call is known at its end.
                    text = "".join(one.text for one in answers[index])
                    yield _event(shape.chunk(index, piece.model_copy(update={"text": text}), first=True))
        if with_usage:
            yield _event(shape.usage_chunk(answers))
        yield ServerSentEvent("[DONE]")
    except (EngineError, TimeoutError) as failure:
        seen.status = 504 if isinstance(failure, TimeoutError) else failure.status
        yield _event(_failure(failure, server.settings.request_timeout))
    finally:
        _note(seen, [pieces for pieces in answers if pieces])
        inside.__exit__(None, None, None)


async def _together(engine: Engine, jobs: list[Job]) -> AsyncIterator[tuple[int, Piece]]:
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


async def _unless_gone(request: Request, seconds: float, work: Awaitable[Any]) -> Any:
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


def _note(seen: Seen, answers: list[list[Piece]]) -> None:
    """What the record says of the answers."""
    seen.prompt_tokens = max((pieces[-1].prompt_tokens for pieces in answers), default=0)
    seen.completion_tokens = sum(pieces[-1].completion_tokens for pieces in answers)
    if seen.contents is not None:
        seen.contents["answers"] = ["".join(piece.text for piece in pieces) for pieces in answers]


def _event(content: dict[str, Any]) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(content, ensure_ascii=False))


class Promotion(BaseModel):
    """`POST /admin/promote`."""

    model_config = ConfigDict(extra="forbid")
    version: str
    force: bool = False


class Rollback(BaseModel):
    """`POST /admin/rollback`."""

    model_config = ConfigDict(extra="forbid")
    version: str | None = None


@_admin.get("/status")
async def status(server: Here) -> dict[str, Any]:
    """What `treering status` says, and what serves."""
    found = await asyncio.to_thread(overview.status, server.ws)
    return {**found, "serving": server.following.serving, "problem": server.following.problem}


@_admin.post("/promote")
async def promote(body: Promotion, server: Here) -> dict[str, Any]:
    """Make a version current."""
    await asyncio.to_thread(server.ws.promote, body.version, force=body.force)
    return await _moved(server)


@_admin.post("/rollback")
async def rollback(body: Rollback, server: Here) -> dict[str, Any]:
    """Go back to the version promoted before, or to the one named."""
    await asyncio.to_thread(server.ws.rollback, body.version)
    return await _moved(server)


async def _moved(server: Server) -> dict[str, Any]:
    await server.following.look()
    here = registry.current(server.ws)
    return {"current": here.name if here else None, "serving": server.following.serving}


@_health.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 while the process lives."""
    return {"status": "ok"}


@_health.get("/readyz", response_model=None)
async def readyz(server: Here) -> Any:
    """200 while requests are answered; also which version serves, and why not a newer one."""
    ready = server.engine.alive and not server.draining
    body = {"ready": ready, "serving": server.following.serving, "problem": server.following.problem}
    return JSONResponse(body, 200 if ready else 503)


@_health.get("/metrics", dependencies=[Depends(_may("api"))], response_model=None)
async def metrics(server: Here) -> Any:
    """Prometheus metrics."""
    page = server.telemetry.page(server.limits.inside, server.engine.alive, server.following.serving)
    return Response(page, media_type="text/plain; version=0.0.4")


def _failure(failure: EngineError | TimeoutError, seconds: float) -> dict[str, Any]:
    if isinstance(failure, EngineError):
        return error(str(failure), _kind(failure.status), failure.code)
    return error(_too_long(seconds), "server_error", "timeout")


def _kind(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


async def _engine_error(_: Request, failure: EngineError) -> JSONResponse:
    headers = {"retry-after": str(failure.retry_after)} if isinstance(failure, TooManyError) else None
    return JSONResponse(error(str(failure), _kind(failure.status), failure.code), failure.status, headers)


async def _treering_error(_: Request, failure: TreeringError) -> JSONResponse:
    status, code = 500, "internal_error"
    if isinstance(failure, UsageError):
        status, code = 400, "invalid_request"
    elif isinstance(failure, LockError):
        status, code = 409, "workspace_in_use"
    return JSONResponse(error(str(failure), _kind(status), code), status)


async def _validation_error(_: Request, failure: RequestValidationError) -> JSONResponse:
    first = failure.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in failure.errors()[:5])
    return JSONResponse(error(message, "invalid_request_error", "invalid_request", where or None), 400)


async def _http_error(_: Request, failure: HTTPException) -> JSONResponse:
    return JSONResponse(error(str(failure.detail), _kind(failure.status_code)), failure.status_code, failure.headers)


async def _bug(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse(error("an error in the server; its log says more", "server_error", "internal_error"), 500)
