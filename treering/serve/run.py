"""`treering serve`: the application on a port, until it is asked to end."""

from __future__ import annotations

import ipaddress
import logging
import sys
from typing import TYPE_CHECKING

import uvicorn

from treering.errors import UsageError
from treering.serve.app import create_app
from treering.serve.builtin import BuiltinEngine
from treering.serve.keys import read

if TYPE_CHECKING:
    from treering.workspace import Workspace

DRAIN_SECONDS = 30


def serve(ws: Workspace, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or Ctrl-C; then requests under way are finished first.

    Raises `UsageError` for an address that others can reach while no key was made.
    """
    loopback = _is_loopback(host)
    if not loopback and not read(ws.root):
        raise UsageError(
            f"--host {host} can be reached from elsewhere, and no key was made; run `treering keys create` first"
        )
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    app = create_app(ws, BuiltinEngine(ws.root), open_to_all_hosts=not loopback)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )
    server.run()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
