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
from starlette.middleware.trustedhost import TrustedHostMiddleware

from treering import __version__, feedback
from treering.errors import LockError, TreeringError, UsageError
from treering.serve import keepers, openai
from treering.serve.answers import error, kind_of
from treering.serve.engine import Engine, EngineError
from treering.serve.limits import TooManyError
from treering.serve.outer import Outer
from treering.serve.state import Server

if TYPE_CHECKING:
    from treering.workspace import Workspace

FEEDBACK_SECONDS = 5

LOOPBACK = ["127.0.0.1", "localhost", "::1"]

log = logging.getLogger("treering.serve")


def create_app(ws: Workspace, engine: Engine, *, open_to_all_hosts: bool = False) -> FastAPI:
    """The application of one workspace, on an engine that was started.

    On loopback it answers only to loopback's names, so that no web page reaches it by a name of its own.
    """
    server = Server(ws, engine, ws.config().serve)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        await server.following.look()
        work = server.following.run(), server.trial.run(), _accept_feedback(server)
        tasks = [asyncio.create_task(one) for one in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.trial.stop()

    app = FastAPI(title="treering", version=__version__, lifespan=running)
    app.state.server = server
    for router in (openai.router, keepers.admin, keepers.health):
        app.include_router(router)
    app.add_exception_handler(EngineError, cast(Any, _engine_error))
    app.add_exception_handler(TreeringError, cast(Any, _treering_error))
    app.add_exception_handler(RequestValidationError, cast(Any, _validation_error))
    app.add_exception_handler(HTTPException, cast(Any, _http_error))
    app.add_exception_handler(Exception, _bug)
    if not open_to_all_hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK)
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
    headers = {"retry-after": str(failure.retry_after)} if isinstance(failure, TooManyError) else None
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
