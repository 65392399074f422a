"""The body of a request while it comes: no larger and no later than it may be."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from treering.serve.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

SECONDS = 30.0
"""From the head of a request to the end of its body: a megabyte needs 270 kbit/s."""


class Incoming:
    """One body; `unread` as long as more of it is to come."""

    def __init__(self, scope: Scope, receive: Receive, most: int) -> None:
        headers = Headers(scope=scope)
        said = headers.get("content-length", "0")
        self._said = int(said) if said.isdigit() else 0
        self.unread = self._said > 0 or "transfer-encoding" in headers
        self._read = 0
        self._receive = receive
        self._most = most
        self._until = asyncio.get_running_loop().time() + SECONDS

    async def receive(self) -> Message:
        """What comes next. Raises `ApiError` for a body that is too large or too late."""
        if not self.unread:
            return await self._receive()
        if self._said <= self._most:
            try:
                message = await self._next()
            except TimeoutError:
                words = f"the body did not come whole within {SECONDS:g} s; send it again, and faster"
                raise ApiError(words, status=408, code="body_too_slow") from None
        if max(self._said, self._read) > self._most:
            words = f"the request is larger than {self._most} bytes (serve.max_body_bytes)"
            raise ApiError(words, status=413, code="body_too_large")
        return message

    async def drop(self) -> None:
        """Let the rest pass by, as long as it may take: many clients read no answer before they have sent all."""
        with suppress(TimeoutError):
            while self.unread:
                await self._next()

    async def _next(self) -> Message:
        async with asyncio.timeout_at(self._until):
            message = await self._receive()
        self.unread = message.get("more_body", False)
        self._read += len(message.get("body", b""))
        return message
