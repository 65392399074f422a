"""The application: its routes, what surrounds them, and what goes on beside them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from treering import __version__, feedback
from treering.errors import TreeringError
from treering.serve import keepers, openai
from treering.serve.engine import Engine
from treering.serve.errors import told_as_openai_does
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

    app = FastAPI(
        title="treering",
        version=__version__,
        lifespan=running,
        # These pages would fetch scripts from elsewhere, and be empty where there is no elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    for router in (openai.router, keepers.admin, keepers.health):
        app.include_router(router)
    told_as_openai_does(app)
    if not public:
        app.add_middleware(Loopback)
    app.add_middleware(Outer, ended=server.ended, max_body_bytes=server.settings.max_body_bytes)
    return app


async def _accept_feedback(server: Server) -> None:
    """Now and then, make rows of the feedback that needs no review: many at once, for few files in the inbox."""
    if server.settings.feedback not in ("corrections", "all"):
        return
    rule = feedback.Rule(server.ws, server.settings.feedback)
    while True:
        await asyncio.sleep(FEEDBACK_SECONDS)
        try:
            await asyncio.to_thread(rule.accept)
        except TreeringError as problem:
            log.error("feedback waits: %s", problem)
