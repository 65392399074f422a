"""What every request passes first: its name, the bounds of its body, and the record of how it ended."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from treering.serve.incoming import Incoming
from treering.serve.telemetry import Seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TRACE = (b"traceparent", b"tracestate")
"""The headers of a W3C trace context."""


class Outer:
    """ASGI middleware: gives each request an id, refuses large and late bodies, and tells `ended` of it at the end.

    Routes find the record to fill in under `request.state.seen`.
    """

    def __init__(self, app: ASGIApp, ended: Callable[[Seen], None], max_body_bytes: int) -> None:
        self._app = app
        self._ended = ended
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = Seen(f"req-{uuid.uuid4().hex}", scope["method"], scope["path"])
        seen.trace = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in TRACE}
        scope.setdefault("state", {})["seen"] = seen

        body = Incoming(scope, receive, self._limit)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = [(b"x-request-id", seen.id.encode())]
                if seen.version is not None:
                    headers.append((b"x-treering-version", seen.version.encode()))
                if body.unread:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *headers]}
            elif body.unread and not message.get("more_body"):
                await send({**message, "more_body": True})
                await body.drop()
                message = {"type": "http.response.body"}
            await send(message)

        try:
            await self._app(scope, body.receive, answer)
        except Exception:
            seen.status = 500
            raise
        finally:
            # A path nobody serves is no label of its own, or anybody could fill the metrics.
            seen.path = getattr(scope.get("route"), "path", "unknown")
            self._ended(seen)
