"""What a request has to pass before anything of its body is read: a key that may do this, a model that is loaded."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.routing import APIRoute

from treering.errors import TreeringError
from treering.serve.errors import ApiError
from treering.serve.state import seen_of, server_of

if TYPE_CHECKING:
    from treering.serve.keys import Key
    from treering.serve.state import Server

LOADING_SECONDS = 5
"""When to come back to a server that is loading its model."""

Check = Callable[[Request], Awaitable[None]]

log = logging.getLogger("treering.serve")


def guarded(*checks: Check) -> type[APIRoute]:
    """The class of routes whose requests pass `checks` in this order, and first: FastAPI would read the body first."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def check_and_handle(request: Request) -> Any:
                for check in checks:
                    await check(request)
                return await handle(request)

            return check_and_handle

    return Guarded


def may(scope: str, *, counted: bool = False) -> Check:
    """A check that the request's key has `scope`, and if `counted`, that it asks no more often than it may.

    Until a key is made, anybody on this machine may use the API; from elsewhere nobody may, and admin nobody at all.
    """

    async def check(request: Request) -> None:
        server = server_of(request)
        try:
            is_open = scope == "api" and not server.public and server.keys.never_made
            key = None if is_open else _key(request, server)
        except (TreeringError, OSError) as problem:
            if isinstance(problem, ApiError):
                raise
            log.error("%s", problem)  # Who has no key need not be told where they are kept.
            words = "the keys cannot be read, and so nobody is let in; the server's log says more"
            raise ApiError(words, status=500, code="keys_unreadable") from None
        who, limit = None, server.settings.requests_per_minute
        if key is not None:
            who = seen_of(request).key = key.id
            limit = key.requests_per_minute or limit
            if scope == "admin" and key.scope != "admin":
                raise ApiError("this key has no admin scope", status=403, code="insufficient_scope")
        if counted and limit is not None:
            server.limits.ask(who, limit)

    return check


async def opened(request: Request) -> None:
    """Refuse what comes before the model is loaded."""
    if not server_of(request).opened.is_set():
        raise ApiError("the model is being loaded; try again", status=503, code="loading", retry_after=LOADING_SECONDS)


def _key(request: Request, server: Server) -> Key:
    """The key that came with a request. Raises `ApiError` if none did, or one that nobody made."""
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    key = server.keys.find(secret.strip()) if kind.lower() == "bearer" else None
    if key is not None:
        return key
    words = "this server wants a key made by `treering keys create`, as `Authorization: Bearer tr-...`"
    if not server.keys.never_made and not server.keys.all():
        way_out = "" if server.public else ", or delete keys.json to open the server to this machine"
        words = f"the last key was revoked, and so nobody is let in; run `treering keys create`{way_out}"
    raise ApiError(words, status=401, code="invalid_api_key")
