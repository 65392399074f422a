"""`treering serve`: the application on a port, until it is asked to end."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import uvicorn

from treering.automate.beside import in_thread
from treering.automate.loop import Automation
from treering.errors import UsageError
from treering.serve.app import create_app
from treering.serve.keys import read
from treering.serve.loopback import is_loopback
from treering.serve.respond import ENDING_SECONDS

if TYPE_CHECKING:
    from fastapi import FastAPI

    from treering.serve.engine import Engine
    from treering.workspace import Workspace


def serve(
    ws: Workspace,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    updates: bool = False,
    ready: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; then requests under way are finished first. `ready` is told the API's address.

    With `updates` the workspace is also kept up to date, as `treering watch` does; what goes wrong there once that has
    begun does not stop the server.

    Raises `UsageError` for an address that others can reach while no key was made, or that is taken; with `updates`
    `LockError` if another loop runs. Then no model was loaded.
    """
    public = not is_loopback(host)
    if public and not read(ws.root):
        raise UsageError(
            f"--host {host} can be reached from elsewhere, and no key was made; run `treering keys create` first"
        )
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    engine = _engine(ws)
    with _listen(host, port) as listener:
        app = create_app(ws, engine, public=public)
        with in_thread(Automation(ws)) if updates else nullcontext():
            asyncio.run(_run(app, engine, listener, ready))


def _engine(ws: Workspace) -> Engine:
    config = ws.config()
    if config.serve.engine == "vllm":
        from treering.serve.vllm.engine import VllmEngine

        return VllmEngine(ws.root, config)
    from treering.serve.builtin import BuiltinEngine

    return BuiltinEngine(ws.root)


async def _run(app: FastAPI, engine: Engine, listener: socket.socket, ready: Callable[[str], None]) -> None:
    seconds = app.state.server.settings.shutdown_timeout
    settings = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(seconds + ENDING_SECONDS + 1),
    )
    server = uvicorn.Server(settings)

    async def load() -> None:
        try:
            await app.state.server.open()
            ready(f"http://{_address(listener)}/v1")
        except Exception:
            server.should_exit = True
            raise

    async def end() -> None:
        """Requests that do not finish in time are failed, so that their clients hear why; uvicorn would hang up."""
        while not server.should_exit:
            await asyncio.sleep(0.1)
        await asyncio.sleep(seconds)
        await engine.stop()

    # Uvicorn ends at these, and then raises them once more: by that time all is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    # It answers while the model is being loaded, if only to say so.
    loading, ending = asyncio.create_task(load()), asyncio.create_task(end())
    try:
        await server.serve(sockets=[listener])
    finally:
        loading.cancel()
        ending.cancel()
        await engine.stop()
    with suppress(asyncio.CancelledError):
        await loading


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port} cannot be listened on ({error}); take another") from None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
