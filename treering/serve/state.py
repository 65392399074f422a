"""What all routes share, and what is known of the request they answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, cast

from fastapi import Depends, Request

from treering.serve.errors import ApiError, ErrorBody
from treering.serve.following import Following
from treering.serve.keys import Keys
from treering.serve.limits import Limits
from treering.serve.telemetry import Seen, Telemetry
from treering.serve.tracing import Tracing
from treering.serve.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from treering.sections import ServeConfig
    from treering.serve.engine import Engine
    from treering.workspace import Workspace

LOADING_SECONDS = 5
"""When to come back to a server that is loading its model."""


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


def _server(request: Request) -> Server:
    return cast(Server, request.app.state.server)


def _seen(request: Request) -> Seen:
    return cast(Seen, request.state.seen)


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in {
        400: "A wrong request",
        401: "No key, or an unknown one",
        403: "The key may not do this",
        404: "No such model or path",
        409: "Another process holds the workspace",
        413: "Too large",
        429: "Too many",
        500: "An error in the server or the workspace",
        503: "The model is loading, or the engine or the version cannot answer",
        504: "It took too long",
    }.items()
}
"""What may go wrong on any route, for the page that describes the API."""

Here = Annotated[Server, Depends(_server)]
Record = Annotated[Seen, Depends(_seen)]


async def opened(server: Here) -> None:
    """Refuse what comes before the model is loaded."""
    if not server.opened.is_set():
        raise ApiError("the model is being loaded; try again", status=503, code="loading", retry_after=LOADING_SECONDS)


def may(scope: str) -> Callable[..., Awaitable[None]]:
    """A check that the request's key has `scope`.

    While there is no key, anybody on this machine may use the API; from elsewhere nobody may, and admin nobody at all.
    """

    async def check(request: Request, server: Here, seen: Record) -> None:
        if scope == "api" and not server.public and not server.keys.all():
            return
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        key = server.keys.find(secret.strip()) if kind.lower() == "bearer" else None
        if key is None:
            raise ApiError(
                "this server wants a key made by `treering keys create`, as `Authorization: Bearer tr-...`",
                status=401,
                code="invalid_api_key",
            )
        seen.key = key.id
        if scope == "admin" and key.scope != "admin":
            raise ApiError("this key has no admin scope", status=403, code="insufficient_scope")
        limit = key.requests_per_minute or server.settings.requests_per_minute
        if limit is not None:
            server.limits.ask(key.id, limit)

    return check
