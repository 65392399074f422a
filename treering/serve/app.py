"""The application: routes, what surrounds them, and errors in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from treering import __version__, feedback
from treering.errors import LockError, TreeringError, UsageError
from treering.serve import keepers, openai
from treering.serve.answers import error, kind_of
from treering.serve.engine import Engine, EngineError
from treering.serve.limits import LaterError
from treering.serve.loopback import Loopback
from treering.serve.loops import go_on
from treering.serve.outer import Outer
from treering.serve.state import Server

if TYPE_CHECKING:
    from treering.workspace import Workspace

FEEDBACK_SECONDS = 5

log = logging.getLogger("treering.serve")


def create_app(ws: Workspace, engine: Engine, *, public: bool = False) -> FastAPI:
    """The application of one workspace. It answers once its server (`app.state.server`) was opened.

    `public`: others than this machine reach it, so it takes known keys only. On loopback it refuses web pages instead.
    """
    server = Server(ws, engine, ws.config().serve, public=public)

    async def work() -> None:
        await server.opened.wait()
        await asyncio.gather(
            go_on("following `current`", server.following.run),
            go_on("following the version on trial", server.trial.run),
            go_on("accepting feedback", lambda: _accept_feedback(server)),
        )

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        working = asyncio.create_task(work())
        try:
            yield
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await server.stop()

    app = FastAPI(title="treering", version=__version__, lifespan=running)
    app.state.server = server
    for router in (openai.router, keepers.admin, keepers.health):
        app.include_router(router)
    app.add_exception_handler(EngineError, cast(Any, _engine_error))
    app.add_exception_handler(TreeringError, cast(Any, _treering_error))
    app.add_exception_handler(RequestValidationError, cast(Any, _validation_error))
    app.add_exception_handler(HTTPException, cast(Any, _http_error))
    app.add_exception_handler(Exception, _bug)
    if not public:
        app.add_middleware(Loopback)
    app.add_middleware(Outer, ended=server.ended, max_body_bytes=server.settings.max_body_bytes)
    return app


async def _accept_feedback(server: Server) -> None:
    """Now and then, make rows of the feedback that needs no review: many at once, for few files in the inbox."""
    while server.settings.feedback in ("corrections", "all"):
        await asyncio.sleep(FEEDBACK_SECONDS)
        try:
            await asyncio.to_thread(feedback.accept_by_rule, server.ws, server.settings.feedback)
        except TreeringError as problem:
            log.error("feedback waits: %s", problem)


async def _engine_error(_: Request, failure: EngineError) -> JSONResponse:
    headers = {"retry-after": str(failure.retry_after)} if isinstance(failure, LaterError) else None
    return JSONResponse(error(str(failure), kind_of(failure.status), failure.code), failure.status, headers)


async def _treering_error(_: Request, failure: TreeringError) -> JSONResponse:
    status, code = 500, "internal_error"
    if isinstance(failure, UsageError):
        status, code = 400, "invalid_request"
    elif isinstance(failure, LockError):
        status, code = 409, "workspace_in_use"
    return JSONResponse(error(str(failure), kind_of(status), code), status)


async def _validation_error(_: Request, failure: RequestValidationError) -> JSONResponse:
    first = failure.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in failure.errors()[:5])
    return JSONResponse(error(message, "invalid_request_error", "invalid_request", where or None), 400)


async def _http_error(_: Request, failure: HTTPException) -> JSONResponse:
    return JSONResponse(error(str(failure.detail), kind_of(failure.status_code)), failure.status_code, failure.headers)


async def _bug(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse(error("an error in the server; its log says more", "server_error", "internal_error"), 500)
