"""What every request passes first: its name, its size, and the record of how it ended."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from treering.serve.telemetry import Seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

TRACE = (b"traceparent", b"tracestate")
"""The headers of a W3C trace context."""


class Outer:
    """ASGI middleware: gives each request an id, refuses large bodies, and tells `ended` of it at the end.

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

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = [(b"x-request-id", seen.id.encode())]
                if seen.version is not None:
                    headers.append((b"x-treering-version", seen.version.encode()))
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, f"the request is larger than {self._limit} bytes (serve.max_body_bytes)")
            return message

        try:
            await self._app(scope, limited, answer)
        except Exception:
            seen.status = 500
            raise
        finally:
            # A path nobody serves is no label of its own, or anybody could fill the metrics.
            seen.path = getattr(scope.get("route"), "path", "unknown")
            self._ended(seen)
