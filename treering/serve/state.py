"""What all routes share, and what is known of the request they answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request

from treering.serve.answered import Answered
from treering.serve.errors import ErrorBody
from treering.serve.following import Following
from treering.serve.keys import Keys
from treering.serve.limits import Limits
from treering.serve.telemetry import Seen, Telemetry
from treering.serve.tracing import Tracing
from treering.serve.trial import Trial

if TYPE_CHECKING:
    from treering.sections import ServeConfig
    from treering.serve.engine import Engine
    from treering.workspace import Workspace


class Server:
    """One workspace being served; `public` if others than this machine reach it."""

    def __init__(self, ws: Workspace, engine: Engine, settings: ServeConfig, *, public: bool = False) -> None:
        self.ws = ws
        self.engine = engine
        self.settings = settings
        self.public = public
        self.opened = asyncio.Event()
        self.following = Following(ws, engine)
        self.keys = Keys(ws.root)
        self.limits = Limits(settings.max_batch_size + settings.max_queue)
        self.answered = Answered()
        self.telemetry = Telemetry()
        self.tracing = Tracing() if settings.telemetry == "otlp" else None
        self.trial = Trial(ws, engine, self.limits, settings, self.telemetry.tried)

    async def open(self) -> None:
        """Have the model loaded, and the version that serves; from then on requests are answered."""
        await self.engine.start()
        await self.following.look()
        self.opened.set()

    @property
    def problem(self) -> str:
        """Why something else serves than should; empty if nothing is wrong."""
        return "; ".join(filter(None, (self.following.problem, self.trial.problem)))

    def ended(self, seen: Seen) -> None:
        """A request ended, however it did."""
        self.telemetry.ended(seen)
        self.trial.ended(seen)
        if self.tracing is not None:
            self.tracing.ended(seen)

    async def stop(self) -> None:
        """Write and send what was not yet."""
        await self.trial.stop()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.stop)


def server_of(request: Request) -> Server:
    """The server that got it."""
    return cast(Server, request.app.state.server)


def seen_of(request: Request) -> Seen:
    """What is known of it."""
    return cast(Seen, request.state.seen)


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in {
        400: "A wrong request",
        401: "No key, or an unknown one",
        403: "The key may not do this",
        404: "No such model, answer or path",
        409: "Another process holds the workspace, or the answer has its thumb already",
        408: "The body did not come in time",
        413: "Too large",
        429: "Too many",
        500: "An error in the server or the workspace",
        503: "The model is loading, or the engine or the version cannot answer",
        504: "It took too long",
    }.items()
}
"""What may go wrong on any route, for the page that describes the API."""

Here = Annotated[Server, Depends(server_of)]
Record = Annotated[Seen, Depends(seen_of)]
