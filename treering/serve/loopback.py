"""On loopback, where no key is needed: for this machine's programs, and for no web page in its browser."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from treering.serve.errors import refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class Loopback:
    """ASGI middleware: refuses requests that a web page made, under a name of its own or from a site of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or say why not."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if not is_loopback(_name(host)):
                words = f"this server listens on loopback and has no name {host!r}; ask for 127.0.0.1 or localhost"
                await refusal(400, words, "invalid_host")(scope, receive, send)
                return
            if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
                words = f"a page of {origin} may not use this server; let that site's own server ask, with a key"
                await refusal(403, words, "foreign_origin")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str:
    """The host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
